"""The only room that speaks SQL: connections, schema installation, the store, the embedded server."""

-- Which versions of our schemas are installed.

-- read_versions --
-- The versions of both.
SELECT pgflow.engine_version() AS engine, pgflow_prefect.adapter_version() AS adapter

-- read_isolation --
-- The isolation level of a statement that names none: of the role, the database, or the server.
SELECT current_setting('default_transaction_isolation') AS isolation

-- read_engine_version --
-- The version of the installed pgflow.sql.
SELECT pgflow.engine_version() AS version

-- read_adapter_version --
-- The version of the installed pgflow_prefect.sql.
SELECT pgflow_prefect.adapter_version() AS version

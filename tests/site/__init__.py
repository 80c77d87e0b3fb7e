"""What makes the documentation site, beside the guide's pages and `mkdocs.yml`. None of it is in the wheel."""

-- Which versions of our schemas are installed.

-- find_schemas --
-- Whether the engine's and the adapter's schema are there.
SELECT to_regprocedure('pgflow.engine_version()') IS NOT NULL AS engine,
       to_regprocedure('pgflow_prefect.adapter_version()') IS NOT NULL AS adapter

-- read_engine_version --
-- The version of the installed pgflow.sql.
SELECT pgflow.engine_version() AS version

-- read_adapter_version --
-- The version of the installed pgflow_prefect.sql.
SELECT pgflow_prefect.adapter_version() AS version

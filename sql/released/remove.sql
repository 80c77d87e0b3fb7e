-- Takes everything of pgflow_prefect out of a database of the released pgflow: `pgflow-prefect init --remove`.
--
-- It drops each object by itself, so that one of yours that depends on it is an error, and is not dropped with it. What
-- roles.sql granted on the tables of pgflow is revoked; the roles stay, for they belong to the whole server.
-- psql -d DATABASE -f remove.sql; one transaction, safe to run again.

BEGIN ISOLATION LEVEL READ COMMITTED;

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $remove$
DECLARE
    object record;
    tables text;
BEGIN
    IF to_regclass('pgflow_prefect.owners') IS NOT NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect of this database belongs to the classic schema'
            USING HINT = 'Its rows say who executes your runs: drop it yourself, if nothing there is needed.';
    END IF;
    FOR object IN
        SELECT format('DROP %s %s', CASE p.prokind WHEN 'p' THEN 'PROCEDURE' WHEN 'a' THEN 'AGGREGATE' ELSE 'FUNCTION' END,
                      p.oid::regprocedure) AS command
        FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = 'pgflow_prefect'
    LOOP
        EXECUTE object.command;
    END LOOP;
    SELECT string_agg(format('%I.%I', n.nspname, c.relname), ', ') INTO tables
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'pgflow_prefect' AND c.relkind IN ('r', 'p');
    IF tables IS NOT NULL THEN
        EXECUTE 'DROP TABLE ' || tables; -- together: one may refer to another
    END IF;
    DROP SCHEMA IF EXISTS pgflow_prefect;
    FOR object IN
        SELECT format('REVOKE ALL ON %s FROM %I', granted.what, r.rolname) AS command
        FROM pg_catalog.pg_roles r,
             LATERAL (SELECT 'SCHEMA pgflow' AS what UNION ALL SELECT 'ALL TABLES IN SCHEMA pgflow') AS granted
        WHERE r.rolname IN ('pgflow_observe', 'pgflow_work')
    LOOP
        EXECUTE object.command;
    END LOOP;
END
$remove$;

COMMIT;

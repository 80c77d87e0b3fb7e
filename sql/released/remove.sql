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
    IF to_regclass('pgflow_prefect.moved_flows') IS NOT NULL THEN
        IF EXISTS (SELECT FROM pgflow_prefect.run_owners o WHERE NOT o.settled AND o.lease_until > clock_timestamp()
                   AND EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = o.run_id AND r.status = 'started')) THEN
            RAISE EXCEPTION 'a process of pgflow-prefect executes runs of this database'
                USING ERRCODE = 'object_in_use', HINT = 'Stop the workers first. They hand their runs back.';
        END IF;
        PERFORM pgflow_prefect.move_flow_back(m.flow_slug) FROM pgflow_prefect.moved_flows m WHERE m.is_ours;
        PERFORM pgflow_prefect.guard_tasks(false);
        DELETE FROM pgflow.workers w USING pgflow_prefect.moved_flows m WHERE w.worker_id = m.worker_id;
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
             LATERAL (SELECT 'SCHEMA pgflow' AS what UNION ALL SELECT 'ALL TABLES IN SCHEMA pgflow'
                      UNION ALL
                      SELECT u.what FROM unnest(ARRAY['SCHEMA ', 'ALL TABLES IN SCHEMA ', 'ALL FUNCTIONS IN SCHEMA ']) AS k (kind),
                                         pg_catalog.pg_namespace n,
                                         LATERAL (SELECT k.kind || quote_ident(n.nspname) AS what) u
                      WHERE n.nspname IN ('pgflow', 'pgmq', 'realtime') AND r.rolname = 'pgflow_execute') AS granted
        WHERE r.rolname IN ('pgflow_observe', 'pgflow_work', 'pgflow_execute')
    LOOP
        BEGIN
            EXECUTE object.command;
        EXCEPTION WHEN insufficient_privilege THEN
            NULL; -- Supabase owns it, and we could grant nothing there
        END;
    END LOOP;
END
$remove$;

COMMIT;

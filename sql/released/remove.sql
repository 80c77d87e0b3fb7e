-- Takes everything of pgflow_prefect out of a database of the released pgflow: `pgflow-prefect init --remove`.
--
-- It drops each object by itself, so that one of yours that depends on it is an error, and is not dropped with it. What
-- roles.sql granted on the tables of pgflow is revoked; the roles stay, for they belong to the whole server. Messages of
-- moved steps return to their queues, also where the schema pgflow_prefect is gone already.
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
    IF has_schema_privilege(to_regnamespace('pgmq'), 'USAGE') THEN -- otherwise this role has never moved a step
        -- Messages that are nowhere, because our tables were dropped or restored without them: each says which task it is of.
        FOR object IN
            SELECT format($command$
                WITH lost AS (
                    SELECT t.message_id AS msg_id, 0 AS read_ct, t.queued_at AS enqueued_at,
                           CASE WHEN t.status = 'started'
                                THEN t.started_at + make_interval(secs => coalesce(s.opt_timeout, f.opt_timeout) + 2)
                                ELSE clock_timestamp() END AS vt,
                           jsonb_build_object('flow_slug', t.flow_slug, 'run_id', t.run_id, 'step_slug', t.step_slug,
                                              'task_index', t.task_index) AS message
                    FROM pgflow.step_tasks t
                    JOIN pgflow.runs r ON r.run_id = t.run_id AND r.status = 'started'
                    JOIN pgflow.step_states a ON a.run_id = t.run_id AND a.step_slug = t.step_slug AND a.status = 'started'
                    JOIN pgflow.steps s ON s.flow_slug = t.flow_slug AND s.step_slug = t.step_slug
                    JOIN pgflow.flows f ON f.flow_slug = t.flow_slug
                    WHERE t.flow_slug = %1$L AND t.status IN ('queued', 'started') AND t.message_id IS NOT NULL
                      AND to_jsonb(t) ->> 'permanently_stalled_at' IS NULL -- no column of this name before 0.13.2
                      AND NOT EXISTS (SELECT FROM pgmq.%2$I q WHERE q.msg_id = t.message_id)
                    FOR NO KEY UPDATE OF t SKIP LOCKED),
                rebuilt AS (
                    INSERT INTO pgmq.%2$I OVERRIDING SYSTEM VALUE
                    SELECT q.* FROM lost l, jsonb_populate_record(NULL::pgmq.%2$I, to_jsonb(l)) q
                    ON CONFLICT DO NOTHING RETURNING msg_id)
                SELECT setval(%3$L::regclass, max(b.msg_id)) FROM rebuilt b
                HAVING coalesce(pg_sequence_last_value(%3$L::regclass), 0) < max(b.msg_id)
                $command$, f.flow_slug, u.queue, pg_get_serial_sequence(format('pgmq.%I', u.queue), 'msg_id')) AS command
            FROM pgflow.flows f, LATERAL (SELECT pgmq.format_table_name(f.flow_slug, 'q') AS queue) u
            WHERE to_regclass(format('pgmq.%I', u.queue)) IS NOT NULL
              AND EXISTS (SELECT FROM pgflow.runs r WHERE r.flow_slug = f.flow_slug AND r.status = 'started')
        LOOP
            EXECUTE object.command;
        END LOOP;
    END IF;
    FOR object IN
        SELECT format('REVOKE ALL ON %s FROM %I', granted.what, r.rolname) AS command
        FROM pg_catalog.pg_roles r,
             LATERAL (SELECT 'SCHEMA pgflow' AS what UNION ALL SELECT 'ALL TABLES IN SCHEMA pgflow'
                      UNION ALL
                      SELECT u.what FROM unnest(ARRAY['SCHEMA ', 'ALL TABLES IN SCHEMA ', 'ALL SEQUENCES IN SCHEMA ',
                                                 'ALL FUNCTIONS IN SCHEMA ']) AS k (kind),
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

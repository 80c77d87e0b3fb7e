-- pgflow_prefect: runs that Airflow executes, written by a mirror of its metadata database.
--
-- A part of the contract of ../CONTRACT.md for the classic schema. Needs pgflow.sql, classic/pgflow_prefect.sql,
-- classic/recording.sql and classic/airflow_tasks.sql.
-- psql -d DATABASE -f mirror.sql; one transaction, safe to run again.
--
-- A mirrored run has rows like any other run, with Airflow's states and times, and a row in mirrored_runs. No process of
-- ours takes it: only the mirror moves it, until a user makes it a run of this database (executed_here). The row in
-- task_runs of a step that Airflow executes has the handler 'airflow': no worker claims it. A step that a process of ours
-- has claimed has another handler there, and the mirror leaves it alone.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regprocedure('pgflow_prefect.is_unshown(uuid)') IS NULL
       OR to_regclass('pgflow_prefect.airflow_dags') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect is missing or old'
            USING HINT = 'Run pgflow.sql, classic/pgflow_prefect.sql, recording.sql and airflow_tasks.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0';
    PERFORM pgflow.lock_schema('pgflow_prefect');
    IF (SELECT max(substring(p.prosrc FROM '[0-9]+')::int) FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = 'pgflow_prefect'::regnamespace AND p.proname = 'adapter_version') > 10 THEN
        RAISE EXCEPTION 'the schema pgflow_prefect has a later version than 10, and this script is of version 10'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Upgrade the program: pip install --upgrade pgflow-prefect';
    END IF;
END
$guard$;

------------------------------------------------------------------------------------------------------------
-- Who follows Airflow
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.add_mirror(workflow_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    PERFORM FROM pgflow.workflows w WHERE w.slug = add_mirror.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO pgflow_prefect.mirrors (workflow_slug) VALUES (add_mirror.workflow_slug) ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.add_mirror(text) IS
    'Lets mirrors follow the runs of the DAG that has this workflow''s slug as its id; false: they do so already.';


CREATE OR REPLACE FUNCTION pgflow_prefect.has_policy(workflow_slug text) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT EXISTS (SELECT FROM pgflow_prefect.airflow_dags d
                   WHERE d.workflow_slug = has_policy.workflow_slug AND d.removed_at IS NULL)
$$;

COMMENT ON FUNCTION pgflow_prefect.has_policy(text) IS
    'True for a DAG whose own tasks report here, by a policy in Airflow: a mirror begins no run of it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_mirrors(holder uuid, held_by text, lease double precision)
RETURNS TABLE (workflow_slug text, epoch int, read_to bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH free AS (
            SELECT m.workflow_slug FROM pgflow_prefect.mirrors m
            JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = m.workflow_slug AND e.enabled
            WHERE (m.holder = take_mirrors.holder OR m.lease_until < clock_timestamp())
            ORDER BY m.workflow_slug
            FOR NO KEY UPDATE OF m SKIP LOCKED
        )
        UPDATE pgflow_prefect.mirrors m
        SET epoch = m.epoch + (m.holder IS DISTINCT FROM take_mirrors.holder)::int, holder = take_mirrors.holder,
            held_by = take_mirrors.held_by, lease_until = clock_timestamp() + make_interval(secs => take_mirrors.lease)
        FROM free
        WHERE m.workflow_slug = free.workflow_slug
        RETURNING m.workflow_slug, m.epoch, m.read_to;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_mirrors(uuid, text, double precision) IS
    'Takes the mirrors of enabled workflows that no other service holds, and extends those that this service holds, for '
    '`lease` seconds. read_to: Airflow''s runs up to this id were looked at; NULL: none was yet.';


CREATE OR REPLACE FUNCTION pgflow_prefect.release_mirrors(holder uuid) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    UPDATE pgflow_prefect.mirrors m SET lease_until = '-infinity' WHERE m.holder = release_mirrors.holder
$$;

COMMENT ON FUNCTION pgflow_prefect.release_mirrors(uuid) IS 'Lets another service take the mirrors at once.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_look(holder uuid, workflow_slugs text[], read_to bigint) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    UPDATE pgflow_prefect.mirrors m
    SET read_to = greatest(m.read_to, note_look.read_to), looked_at = clock_timestamp()
    WHERE m.holder = note_look.holder AND m.workflow_slug = ANY (note_look.workflow_slugs)
$$;

COMMENT ON FUNCTION pgflow_prefect.note_look(uuid, text[], bigint) IS
    'Notes that a service has looked at Airflow''s runs up to this id, and that all that it found has rows here.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_mirrors()
RETURNS TABLE (workflow_slug text, enabled boolean, held_by text, is_held boolean, looked_at timestamptz,
               since timestamptz)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT m.workflow_slug, coalesce(e.enabled, false), m.held_by, m.lease_until > clock_timestamp(), m.looked_at,
               m.since
        FROM pgflow_prefect.mirrors m
        LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = m.workflow_slug
        ORDER BY m.workflow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_mirrors() IS
    'The workflows whose runs Airflow executes; whether a service follows them now, and when it last did.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_mirrored(
    workflow_slugs text[], only_pending boolean, after bigint, at_most int
) RETURNS TABLE (run_id uuid, workflow_slug text, source_id bigint, source_run_id text, source_mark text, status text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    IF list_mirrored.only_pending THEN -- few runs are pending: by their index
        RETURN QUERY
            SELECT m.run_id, m.workflow_slug, m.source_id, m.source_run_id, m.source_mark, r.status
            FROM pgflow.runs r
            JOIN pgflow_prefect.mirrored_runs m ON m.run_id = r.id AND NOT m.executed_here
            WHERE r.status = 'pending' AND r.workflow_slug = ANY (list_mirrored.workflow_slugs)
              AND m.source_id > list_mirrored.after
            ORDER BY m.source_id
            LIMIT list_mirrored.at_most;
    ELSE
        RETURN QUERY
            SELECT m.run_id, m.workflow_slug, m.source_id, m.source_run_id, m.source_mark, r.status
            FROM unnest(list_mirrored.workflow_slugs) AS w (slug)
            CROSS JOIN LATERAL (
                SELECT * FROM pgflow_prefect.mirrored_runs m
                WHERE m.workflow_slug = w.slug AND m.source_id > list_mirrored.after AND NOT m.executed_here
                ORDER BY m.source_id LIMIT list_mirrored.at_most) m
            JOIN pgflow.runs r ON r.id = m.run_id
            ORDER BY m.source_id
            LIMIT list_mirrored.at_most;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_mirrored(text[], boolean, bigint, int) IS
    'Mirrored runs of these workflows behind this id of Airflow''s, in the order of these ids; of all, or of those that '
    'are pending here.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_mirrored(workflow_slugs text[], source_run_ids text[])
RETURNS TABLE (run_id uuid, workflow_slug text, source_id bigint, source_run_id text, source_mark text, status text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT m.run_id, m.workflow_slug, m.source_id, m.source_run_id, m.source_mark, m.status
        FROM unnest(find_mirrored.workflow_slugs, find_mirrored.source_run_ids) AS w (slug, run_id)
        CROSS JOIN LATERAL (
            SELECT m.*, r.status FROM pgflow_prefect.mirrored_runs m JOIN pgflow.runs r ON r.id = m.run_id
            WHERE m.workflow_slug = w.slug AND m.source_run_id = w.run_id OFFSET 0) m;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_mirrored(text[], text[]) IS
    'Those of these runs of Airflow that have rows here, each given by its workflow and its id there.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_executed_elsewhere(run_ids uuid[]) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT m.run_id FROM pgflow_prefect.mirrored_runs m
        WHERE m.run_id = ANY (find_executed_elsewhere.run_ids) AND NOT m.executed_here;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_executed_elsewhere(uuid[]) IS
    'Those of these runs that Airflow executes, or has executed.';


------------------------------------------------------------------------------------------------------------
-- Writing what Airflow has
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.execute_mirrored_run(run_id uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    PERFORM FROM pgflow.runs r WHERE r.id = execute_mirrored_run.run_id FOR NO KEY UPDATE; -- mirror_run is before or after
    IF EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m
               JOIN pgflow.step_states s ON s.run_id = m.run_id AND s.status = 'failed'
               JOIN pgflow.step_items i ON i.run_id = s.run_id AND i.step_slug = s.step_slug
               WHERE m.run_id = execute_mirrored_run.run_id AND i.status = 'failed' AND i.item = 'null') THEN
        RAISE EXCEPTION 'run % can''t be executed here: what its failed map is over was not copied from Airflow', run_id
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'mirrored_runs',
                  HINT = 'Clear the task in Airflow, or begin a new run here.';
    END IF;
    UPDATE pgflow_prefect.mirrored_runs m SET executed_here = true
    WHERE m.run_id = execute_mirrored_run.run_id AND NOT m.executed_here
      AND EXISTS (SELECT FROM pgflow.runs r WHERE r.id = m.run_id AND r.status = 'failed'); -- not begun again in Airflow
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE pgflow_prefect.owners o SET lease_until = '-infinity' WHERE o.run_id = execute_mirrored_run.run_id;
    -- A worker may claim its steps now.
    DELETE FROM pgflow_prefect.task_runs t WHERE t.run_id = execute_mirrored_run.run_id AND t.handler = 'airflow';
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.execute_mirrored_run(uuid) IS
    'Lets workers and bridges take a run that Airflow has executed, once it is reopened; the mirror leaves it alone from '
    'now on. False: it was no such run, or has not failed.';


CREATE OR REPLACE FUNCTION pgflow_prefect.parse_mirrored_run(document jsonb) RETURNS pgflow.runs
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    run pgflow.runs;
BEGIN
    run.id := document ->> 'run_id';
    run.workflow_slug := document ->> 'workflow_slug';
    run.status := document ->> 'status';
    run.ended_as := document ->> 'ended_as';
    run.payload := coalesce(document -> 'payload', '{}');
    run.error_message := document ->> 'error_message';
    run.created_at := document ->> 'created_at';
    run.finished_at := document ->> 'finished_at';
    run.logical_date := document ->> 'logical_date';
    IF document ->> 'interval_start' IS NOT NULL AND document ->> 'interval_end' IS NOT NULL THEN
        run.data_interval := tstzrange(least((document ->> 'interval_start')::timestamptz,
                                             (document ->> 'interval_end')::timestamptz),
                                       (document ->> 'interval_end')::timestamptz);
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.parse_mirrored_run(jsonb) IS 'The row of a run that mirror_run is to write. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.parse_mirrored_steps(run pgflow.runs, document jsonb, results text[])
RETURNS TABLE (step_slug text, place bigint, is_new boolean, is_changed boolean, status text, skip_reason text, skip_note text, attempts int,
               error_message text, created_at timestamptz, started_at timestamptz, finished_at timestamptz,
               task_run_id uuid, state_name text, has_result boolean, step_result jsonb, result_problem text, tasks int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT e.slug, e.place, s.run_id IS NULL,
               (s.status, s.attempts, s.error_message, s.started_at, s.finished_at, s.skip_reason, s.skip_note, t.state_name)
                   IS DISTINCT FROM
                   (coalesce(e.value ->> 'status', 'pending'), (e.value ->> 'attempts')::int, e.value ->> 'error_message',
                    (e.value ->> 'started_at')::timestamptz, (e.value ->> 'finished_at')::timestamptz,
                    e.value ->> 'skip_reason', e.value ->> 'skip_note',
                    CASE WHEN e.value ->> 'skip_reason' IS NULL THEN e.value ->> 'state_name' END)
                   OR (e.value ->> 'result' IS NOT NULL AND j.problem IS NULL AND s.step_result IS DISTINCT FROM j.document),
               coalesce(e.value ->> 'status', 'pending'), e.value ->> 'skip_reason',
               e.value ->> 'skip_note', (e.value ->> 'attempts')::int, e.value ->> 'error_message',
               (e.value ->> 'created_at')::timestamptz, (e.value ->> 'started_at')::timestamptz,
               (e.value ->> 'finished_at')::timestamptz, (e.value ->> 'task_run_id')::uuid, e.value ->> 'state_name',
               e.value ->> 'result' IS NOT NULL AND j.problem IS NULL, CASE WHEN j.problem IS NULL THEN j.document END,
               j.problem, (e.value ->> 'tasks')::int
        FROM (SELECT value ->> 'slug', value, place
              FROM jsonb_array_elements(document -> 'steps') WITH ORDINALITY AS a (value, place)) AS e (slug, value, place)
        JOIN pgflow.definition_steps d ON d.definition_id = run.definition_id AND d.slug = e.slug
        JOIN pgflow.steps p ON p.workflow_slug = run.workflow_slug AND p.slug = e.slug
        LEFT JOIN pgflow.step_states s ON s.run_id = run.id AND s.step_slug = e.slug
        LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = run.id AND t.step_slug = e.slug AND t.task_index = 0
        LEFT JOIN pgflow_prefect.bindings b ON b.workflow_slug = run.workflow_slug AND b.step_slug = e.slug
        CROSS JOIN LATERAL (
            SELECT r.document, pgflow.find_json_problem(r.document, false)
            FROM (SELECT results[(e.value ->> 'result')::int]::jsonb) AS r (document) OFFSET 0) AS j (document, problem)
        -- A process of ours has claimed it.
        WHERE (t.handler = 'airflow') IS NOT FALSE
          -- What was cleared before it ever began has no row.
          AND (e.value ->> 'status' IS NOT NULL OR s.run_id IS NOT NULL)
          -- It is bound to a handler of ours, and waits for a claim. Airflow may still do it itself.
          AND (t.run_id IS NOT NULL OR coalesce(b.kind, 'external') = 'external' OR e.value ->> 'status' <> 'pending')
        ORDER BY e.value ->> 'tasks' IS NOT NULL, e.place; -- the items of a map are in the result of another step
END
$$;

COMMENT ON FUNCTION pgflow_prefect.parse_mirrored_steps(pgflow.runs, jsonb, text[]) IS
    'The rows of a run''s steps that mirror_run is to write: those that Airflow executes. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.mirror_items(run pgflow.runs, step_slug text, document jsonb, results text[])
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    tasks CONSTANT int := document ->> 'tasks';
    elements jsonb;
    written bigint;
    changed bigint := 0;
BEGIN
    INSERT INTO pgflow.step_maps AS m (run_id, step_slug, total, remaining, next_item, epoch)
    VALUES (run.id, mirror_items.step_slug, tasks, tasks, tasks, run.epoch)
    ON CONFLICT (run_id, step_slug) DO UPDATE SET total = excluded.total, next_item = excluded.total
    WHERE m.total <> excluded.total;
    GET DIAGNOSTICS changed = ROW_COUNT;
    -- Airflow has removed the others: the array has become shorter.
    DELETE FROM pgflow.step_items i
    WHERE i.run_id = run.id AND i.step_slug = mirror_items.step_slug AND i.item_index >= tasks;
    IF document -> 'items' <> '[]' THEN
        SELECT CASE WHEN jsonb_typeof(f.items) = 'array' THEN f.items END INTO elements
        FROM pgflow.definition_steps d
        CROSS JOIN LATERAL pgflow.find_items(run, d.map_over, d.map_path) AS f (items)
        WHERE d.definition_id = run.definition_id AND d.slug = mirror_items.step_slug AND d.step_type = 'map';
        INSERT INTO pgflow.step_items AS i (run_id, step_slug, item_index, item, status, attempts, item_result, skip_reason,
                                            error_message, started_at, finished_at)
        SELECT run.id, mirror_items.step_slug, e.item_index, coalesce(elements -> e.item_index, 'null'),
               coalesce(e.value ->> 'status', 'pending'), (e.value ->> 'attempts')::int, r.document,
               e.value ->> 'skip_reason', e.value ->> 'error_message', (e.value ->> 'started_at')::timestamptz,
               (e.value ->> 'finished_at')::timestamptz
        FROM (SELECT (value ->> 'index')::int, value FROM jsonb_array_elements(document -> 'items') AS a (value))
             AS e (item_index, value)
        CROSS JOIN LATERAL (
            SELECT CASE WHEN pgflow.find_json_problem(r.document, false) IS NULL THEN r.document END
            FROM (SELECT results[(e.value ->> 'result')::int]::jsonb) AS r (document) OFFSET 0) AS r (document)
        ON CONFLICT (run_id, step_slug, item_index) DO UPDATE
        SET status = excluded.status, attempts = excluded.attempts,
            item_result = CASE WHEN excluded.status = 'completed' THEN coalesce(excluded.item_result, i.item_result) END,
            skip_reason = excluded.skip_reason, error_message = excluded.error_message,
            started_at = excluded.started_at, finished_at = excluded.finished_at
        WHERE (i.status, i.attempts, i.skip_reason, i.error_message, i.started_at, i.finished_at) IS DISTINCT FROM
              (excluded.status, excluded.attempts, excluded.skip_reason, excluded.error_message, excluded.started_at,
               excluded.finished_at)
           OR (excluded.status = 'completed' AND excluded.item_result IS NOT NULL
               AND i.item_result IS DISTINCT FROM excluded.item_result);
        GET DIAGNOSTICS written = ROW_COUNT;
        changed := changed + written;
    END IF;
    UPDATE pgflow.step_maps m
    SET remaining = (document ->> 'remaining')::int, failed = (document ->> 'failed')::int
    WHERE m.run_id = run.id AND m.step_slug = mirror_items.step_slug
      AND (m.remaining, m.failed) IS DISTINCT FROM ((document ->> 'remaining')::int, (document ->> 'failed')::int);
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN changed + written > 0;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.mirror_items(pgflow.runs, text, jsonb, text[]) IS
    'Writes the items of a mapped task that have changed; false: none has. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.gather_mirrored(run_id uuid, step_slug text) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    gathered jsonb;
BEGIN
    SELECT coalesce(jsonb_agg(i.item_result ORDER BY i.item_index), '[]') INTO gathered
    FROM pgflow.step_items i
    WHERE i.run_id = gather_mirrored.run_id AND i.step_slug = gather_mirrored.step_slug AND i.status = 'completed'
      AND i.skip_reason IS NULL;
    RETURN CASE WHEN pgflow.find_json_problem(gathered, false) IS NULL THEN gathered END;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.gather_mirrored(uuid, text) IS
    'The results of the items of a mapped task, as an array; NULL where it is beyond the limits. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.has_other_result(run_id uuid, step_slug text, result jsonb) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT has_other_result.result IS NOT NULL AND NOT EXISTS (
        SELECT FROM pgflow.step_states s
        WHERE s.run_id = has_other_result.run_id AND s.step_slug = has_other_result.step_slug
          AND s.step_result = has_other_result.result)
$$;

COMMENT ON FUNCTION pgflow_prefect.has_other_result(uuid, text, jsonb) IS
    'True if a step does not have this result yet. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.count_mirrored(run pgflow.runs) RETURNS int
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN (SELECT d.step_count FROM pgflow.definitions d WHERE d.id = run.definition_id)
         - (SELECT count(*) FROM pgflow.step_states s
            WHERE s.run_id = run.id
              AND CASE WHEN run.uses_rules THEN s.status <> 'pending' ELSE s.status = 'completed' END);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.count_mirrored(pgflow.runs) IS
    'How many steps of a mirrored run have not ended, as the engine counts. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_left_out(run pgflow.runs, document jsonb) RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN ARRAY(
        SELECT e.value ->> 'slug' FROM jsonb_array_elements(document -> 'steps') AS e (value)
        WHERE NOT EXISTS (SELECT FROM pgflow.definition_steps d
                          WHERE d.definition_id = run.definition_id AND d.slug = e.value ->> 'slug')
           OR NOT EXISTS (SELECT FROM pgflow.steps p
                          WHERE p.workflow_slug = run.workflow_slug AND p.slug = e.value ->> 'slug')
        ORDER BY 1);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_left_out(pgflow.runs, jsonb) IS
    'The tasks of Airflow''s run that are no steps of the workflow here. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.begin_mirrored_run(wanted pgflow.runs, document jsonb) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    definition pgflow.definitions := pgflow.find_definition(wanted.workflow_slug);
    run pgflow.runs;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow');
    END IF;
    INSERT INTO pgflow.runs (workflow_slug, id, payload, definition_id, remaining, uses_rules, continues, logical_date,
                             data_interval, created_at)
    VALUES (wanted.workflow_slug, wanted.id, wanted.payload, definition.id, definition.step_count, definition.uses_rules,
            definition.continues, wanted.logical_date, wanted.data_interval,
            coalesce(wanted.created_at, pg_catalog.clock_timestamp()))
    RETURNING * INTO run;
    IF run.id IS NULL THEN
        RAISE EXCEPTION 'the run of workflow "%" was not stored: a trigger or rule on pgflow.runs skipped it',
                        wanted.workflow_slug
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    PERFORM pgflow.set_epoch(run, 1, 1);
    SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) wanted.id;
    INSERT INTO pgflow_prefect.owners (run_id, epoch, flow_run_id, held_by, lease_until, remaining)
    VALUES (run.id, run.epoch, (document OPERATOR(pg_catalog.->>) 'placeholder')::pg_catalog.uuid, 'Airflow', '9999-12-31',
            run.remaining);
    INSERT INTO pgflow_prefect.mirrored_runs (run_id, workflow_slug, source_id, source_run_id, source_mark, imported)
    VALUES (run.id, run.workflow_slug, (document OPERATOR(pg_catalog.->>) 'source_id')::pg_catalog.int8,
            document OPERATOR(pg_catalog.->>) 'source_run_id', '',
            coalesce((document OPERATOR(pg_catalog.->>) 'imported')::pg_catalog.bool, false));
    IF wanted.status OPERATOR(pg_catalog.=) 'pending' THEN
        PERFORM pgflow.announce_run(run);
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.begin_mirrored_run(pgflow.runs, jsonb) IS
    'Inserts a run that Airflow executes, without steps. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_mirrored_run(
    run pgflow.runs, wanted pgflow.runs, quietly boolean
) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    moved pgflow.runs;
    steps_left CONSTANT int := CASE WHEN wanted.status OPERATOR(pg_catalog.=) 'completed' THEN 0
                                   ELSE pgflow_prefect.count_mirrored(run) END;
BEGIN
    IF run.status OPERATOR(pg_catalog.=) wanted.status AND run.remaining OPERATOR(pg_catalog.=) steps_left
       AND (run.error_message OPERATOR(pg_catalog.=) wanted.error_message
            OR (run.error_message IS NULL AND wanted.error_message IS NULL))
       AND (run.finished_at OPERATOR(pg_catalog.=) wanted.finished_at
            OR (run.finished_at IS NULL AND wanted.finished_at IS NULL)) THEN
        RETURN run;
    END IF;
    UPDATE pgflow.runs r
    SET status = wanted.status, ended_as = wanted.ended_as, error_message = wanted.error_message,
        finished_at = CASE WHEN wanted.status OPERATOR(pg_catalog.<>) 'pending'
                           THEN coalesce(wanted.finished_at, pg_catalog.clock_timestamp()) END,
        remaining = steps_left
    WHERE r.id OPERATOR(pg_catalog.=) run.id
    RETURNING r.* INTO moved;
    IF (moved.status OPERATOR(pg_catalog.=) wanted.status) IS NOT TRUE THEN
        RAISE EXCEPTION 'run % was not moved as in Airflow: a trigger or rule on pgflow.runs skipped it', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    UPDATE pgflow_prefect.owners o
    SET settled = false, remaining = moved.remaining,
        lease_until = CASE WHEN moved.status OPERATOR(pg_catalog.=) 'pending' THEN '9999-12-31'
                           ELSE '-infinity' END::pg_catalog.timestamptz
    WHERE o.run_id OPERATOR(pg_catalog.=) run.id;
    IF moved.status OPERATOR(pg_catalog.<>) run.status AND NOT quietly THEN
        PERFORM pgflow.announce_run(moved);
    END IF;
    RETURN moved;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_mirrored_run(pgflow.runs, pgflow.runs, boolean) IS
    'Ends or reopens a run, as Airflow has done; quietly: tells no process of it. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.mirror_run(epoch int, document jsonb, results text[])
RETURNS TABLE (run_id uuid, status text, changed boolean, left_out text[], problems jsonb)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    wanted CONSTANT pgflow.runs := pgflow_prefect.parse_mirrored_run(document);
    run pgflow.runs;
    mirrored pgflow_prefect.mirrored_runs;
    step pg_catalog.record;
    state pgflow.step_states;
    result pg_catalog.jsonb;
    has_new_items boolean;
BEGIN
    IF pgflow.is_under_policies() OR pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    IF mirror_run.epoch IS NOT NULL THEN
        -- The next service waits for this transaction, and then this one's writes are refused.
        PERFORM FROM pgflow_prefect.mirrors m
        WHERE m.workflow_slug OPERATOR(pg_catalog.=) wanted.workflow_slug
          AND m.epoch OPERATOR(pg_catalog.=) mirror_run.epoch FOR SHARE;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'another service follows the runs of workflow "%" in Airflow', wanted.workflow_slug
                USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'mirrors_epoch';
        END IF;
    END IF;
    SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) wanted.id FOR NO KEY UPDATE;
    IF run.id IS NULL AND mirror_run.epoch IS NOT NULL AND pgflow_prefect.has_policy(wanted.workflow_slug) THEN
        RAISE EXCEPTION 'the tasks of workflow "%" report their runs themselves: no mirror begins one', wanted.workflow_slug
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'mirrors_epoch';
    END IF;
    IF run.id IS NULL THEN
        run := pgflow_prefect.begin_mirrored_run(wanted, document);
    END IF;
    SELECT * INTO mirrored FROM pgflow_prefect.mirrored_runs m WHERE m.run_id OPERATOR(pg_catalog.=) run.id;
    run_id := run.id;
    changed := false;
    problems := '{}';
    IF mirrored.executed_here IS NOT FALSE THEN -- a user has made it a run of this database
        status := run.status;
        RETURN NEXT;
        RETURN;
    END IF;
    UPDATE pgflow_prefect.owners o SET flow_run_id = (document OPERATOR(pg_catalog.->>) 'placeholder')::pg_catalog.uuid
    WHERE o.run_id OPERATOR(pg_catalog.=) run.id AND o.flow_run_id IS NULL; -- of a new installation
    IF wanted.status OPERATOR(pg_catalog.=) 'pending' AND run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        run := pgflow_prefect.move_mirrored_run(run, wanted, false); -- before its steps, as reopen_run does
        changed := true;
    END IF;

    FOR step IN SELECT * FROM pgflow_prefect.parse_mirrored_steps(run, document, results) LOOP
        IF step.is_new THEN
            INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug, created_at)
            VALUES (run.workflow_slug, run.id, step.step_slug, coalesce(step.created_at, pg_catalog.clock_timestamp()))
            ON CONFLICT (run_id, step_slug) DO NOTHING;
        END IF;
        result := NULL;
        IF step.tasks IS NOT NULL THEN
            has_new_items := pgflow_prefect.mirror_items(
                run, step.step_slug,
                document OPERATOR(pg_catalog.->) 'steps' OPERATOR(pg_catalog.->) (step.place OPERATOR(pg_catalog.-) 1)::int,
                results);
            changed := changed OR has_new_items;
            IF step.status OPERATOR(pg_catalog.=) 'completed' AND step.skip_reason IS NULL THEN
                result := pgflow_prefect.gather_mirrored(run.id, step.step_slug);
            END IF;
        ELSIF step.has_result THEN
            result := step.step_result;
        END IF;
        IF step.result_problem IS NOT NULL THEN
            problems := problems OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object(
                step.step_slug, pg_catalog.concat('its result ', step.result_problem));
        END IF;
        -- What is as it was fires no trigger of a user again.
        CONTINUE WHEN NOT step.is_changed AND NOT pgflow_prefect.has_other_result(run.id, step.step_slug, result);
        state := NULL;
        UPDATE pgflow.step_states s
        SET status = step.status, ended_as = NULL,
            step_result = CASE WHEN step.status OPERATOR(pg_catalog.<>) 'completed' OR step.skip_reason IS NOT NULL THEN NULL
                               ELSE coalesce(result, CASE WHEN s.attempts OPERATOR(pg_catalog.=) step.attempts
                                                          THEN s.step_result END) END,
            attempts = step.attempts, error_message = step.error_message, started_at = step.started_at,
            finished_at = step.finished_at, skip_reason = step.skip_reason,
            skip_cascades = CASE WHEN step.skip_reason IS NOT NULL THEN false END, skip_note = step.skip_note
        WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) step.step_slug
        RETURNING s.* INTO state;
        IF (state.status OPERATOR(pg_catalog.=) step.status) IS NOT TRUE THEN
            RAISE EXCEPTION 'step "%" of run % was not moved as in Airflow: a trigger or rule on pgflow.step_states '
                            'skipped it', step.step_slug, run.id
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
        END IF;
        IF step.skip_reason IS NULL THEN
            INSERT INTO pgflow_prefect.task_runs AS t (run_id, step_slug, task_index, task_run_id, state_name, handler,
                                                       attempt, first_claimed_at, message)
            VALUES (run.id, step.step_slug, 0, step.task_run_id, step.state_name, 'airflow', step.attempts,
                    step.started_at, step.error_message)
            ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
            SET state_name = excluded.state_name, attempt = excluded.attempt, message = excluded.message,
                first_claimed_at = coalesce(t.first_claimed_at, excluded.first_claimed_at),
                updated_at = pg_catalog.clock_timestamp();
        ELSE -- decided without an attempt
            DELETE FROM pgflow_prefect.task_runs t
            WHERE t.run_id OPERATOR(pg_catalog.=) run.id AND t.step_slug OPERATOR(pg_catalog.=) step.step_slug
              AND t.handler OPERATOR(pg_catalog.=) 'airflow';
        END IF;
        changed := true;
    END LOOP;

    run := pgflow_prefect.move_mirrored_run(run, wanted, mirrored.imported);
    changed := changed OR mirrored.source_mark OPERATOR(pg_catalog.<>) (document OPERATOR(pg_catalog.->>) 'source_mark');
    left_out := pgflow_prefect.list_left_out(run, document);
    IF changed THEN
        UPDATE pgflow_prefect.mirrored_runs m
        SET source_mark = document OPERATOR(pg_catalog.->>) 'source_mark',
            source_id = (document OPERATOR(pg_catalog.->>) 'source_id')::pg_catalog.int8,
            -- What Airflow executes again is followed like any other run.
            imported = m.imported AND run.status OPERATOR(pg_catalog.<>) 'pending',
            notes = m.notes OPERATOR(pg_catalog.||) coalesce(document OPERATOR(pg_catalog.->) 'notes', '{}')
                            OPERATOR(pg_catalog.||) problems
                            OPERATOR(pg_catalog.||) CASE WHEN pg_catalog.cardinality(left_out) OPERATOR(pg_catalog.>) 0
                                THEN pg_catalog.jsonb_build_object('', pg_catalog.concat(
                                    'tasks that are no steps here: ', pg_catalog.array_to_string(left_out, ', ')))
                                ELSE '{}' END
        WHERE m.run_id OPERATOR(pg_catalog.=) run.id;
        IF mirrored.imported AND run.status OPERATOR(pg_catalog.<>) 'pending' THEN
            UPDATE pgflow_prefect.owners o SET settled = true WHERE o.run_id OPERATOR(pg_catalog.=) run.id;
        ELSE
            UPDATE pgflow_prefect.owners o SET settled = false
            WHERE o.run_id OPERATOR(pg_catalog.=) run.id AND o.settled;
        END IF;
    END IF;
    status := run.status;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.mirror_run(int, jsonb, text[]) IS
    'Writes how a run of Airflow stands: the run, and those of its steps that are in `document`. The same again changes '
    'nothing. epoch: of the mirror; NULL for an import. A former service is refused. left_out: tasks that are no steps here. '
    'problems: results that are beyond the limits, by step.';


------------------------------------------------------------------------------------------------------------
-- Shadows: a handler of ours beside a task of Airflow's. They write reports, and nothing of the run.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_airflow_shadows(workflow_slugs text[], step_slugs text[], at_most int)
RETURNS TABLE (run_id uuid, workflow_slug text, step_slug text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT m.run_id, w.workflow_slug, w.step_slug
        FROM unnest(list_airflow_shadows.workflow_slugs, list_airflow_shadows.step_slugs) AS w (workflow_slug, step_slug)
        JOIN pgflow_prefect.bindings b ON b.workflow_slug = w.workflow_slug AND b.step_slug = w.step_slug
                                      AND b.kind = 'external' AND b.options -> 'shadow' = 'true'
        JOIN pgflow.steps p ON p.workflow_slug = w.workflow_slug AND p.slug = w.step_slug AND p.step_type <> 'map'
        CROSS JOIN LATERAL ( -- since when the row says so; a step has few changes
            SELECT c.changed_at FROM pgflow_prefect.binding_changes c
            WHERE c.workflow_slug = w.workflow_slug AND c.step_slug = w.step_slug ORDER BY c.id DESC LIMIT 1) AS bound
        CROSS JOIN LATERAL ( -- the newest runs, so that a look costs the same however many there are
            SELECT r.run_id, r.shown FROM pgflow_prefect.mirrored_runs r
            WHERE r.workflow_slug = w.workflow_slug AND NOT r.imported AND NOT r.executed_here
            ORDER BY r.source_id DESC LIMIT 100) AS m
        JOIN pgflow.step_states s ON s.run_id = m.run_id AND s.step_slug = w.step_slug AND s.status = 'completed'
                                 AND s.skip_reason IS NULL
        JOIN pgflow_prefect.task_runs t ON t.run_id = m.run_id AND t.step_slug = w.step_slug AND t.task_index = 0
                                       AND t.handler = 'airflow' AND t.updated_at >= bound.changed_at
        LEFT JOIN pgflow_prefect.shadow_reports h
            ON h.run_id = m.run_id AND h.step_slug = w.step_slug AND h.task_index = 0
        WHERE (h.run_id IS NULL OR h.reported_at < t.updated_at) -- after a clear, Airflow has another result
          -- Prefect shows the run a moment later, and the lines of the shadow have a place then.
          AND (m.shown OR t.updated_at < clock_timestamp() - interval '1 minute')
        ORDER BY t.updated_at, m.run_id, w.step_slug
        LIMIT list_airflow_shadows.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_airflow_shadows(text[], text[], int) IS
    'Those of these steps, each given by workflow and slug, that Airflow has completed, that a row gives a shadow, and that '
    'no shadow was begun for; of the newest 100 runs of each workflow. Maps have no shadow.';


CREATE OR REPLACE FUNCTION pgflow_prefect.begin_airflow_shadow(run_id uuid, step_slug text, upstream text[])
RETURNS TABLE (payload jsonb, upstream_results jsonb, logical_date timestamptz, interval_start timestamptz,
               interval_end timestamptz, result jsonb, attempt int, began_at timestamptz, ended_at timestamptz,
               task_run_id uuid, flow_run_id uuid, notes jsonb, unread text[])
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    -- One process begins it, once: a handler that ends its process does not end the next one.
    INSERT INTO pgflow_prefect.shadow_reports AS h (run_id, workflow_slug, step_slug, task_index, outcome, details, seconds)
    SELECT m.run_id, m.workflow_slug, t.step_slug, 0, 'failed', ARRAY['it goes on, or its process has ended'], 0
    FROM pgflow_prefect.mirrored_runs m
    JOIN pgflow_prefect.task_runs t ON t.run_id = m.run_id AND t.task_index = 0 AND t.handler = 'airflow'
    JOIN pgflow.step_states s ON s.run_id = t.run_id AND s.step_slug = t.step_slug AND s.status = 'completed'
                             AND s.skip_reason IS NULL
    WHERE m.run_id = begin_airflow_shadow.run_id AND t.step_slug = begin_airflow_shadow.step_slug AND NOT m.executed_here
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET outcome = excluded.outcome, details = excluded.details, seconds = 0, reported_at = clock_timestamp()
    WHERE h.reported_at < (SELECT t.updated_at FROM pgflow_prefect.task_runs t
                           WHERE t.run_id = h.run_id AND t.step_slug = h.step_slug AND t.task_index = 0);
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
        SELECT i.payload, i.upstream_results, i.logical_date, i.interval_start, i.interval_end, s.step_result, s.attempts,
               s.started_at, s.finished_at, t.task_run_id, CASE WHEN m.shown THEN o.flow_run_id END, m.notes,
               ARRAY(SELECT u.step_slug FROM pgflow.step_states u
                     WHERE u.run_id = s.run_id AND u.status = 'completed' AND u.skip_reason IS NULL
                       AND u.step_result IS NULL
                       AND (u.step_slug = s.step_slug
                            OR EXISTS (SELECT FROM pgflow.definition_deps d
                                       WHERE d.definition_id = r.definition_id AND d.to_step_slug = s.step_slug
                                         AND d.from_step_slug = u.step_slug
                                         AND (begin_airflow_shadow.upstream IS NULL
                                              OR d.from_step_slug = ANY (begin_airflow_shadow.upstream))))
                     ORDER BY u.step_slug = s.step_slug DESC, u.step_slug)
        FROM pgflow.step_states s
        JOIN pgflow.runs r ON r.id = s.run_id
        JOIN pgflow_prefect.mirrored_runs m ON m.run_id = s.run_id
        JOIN pgflow_prefect.owners o ON o.run_id = s.run_id
        JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug AND t.task_index = 0
        CROSS JOIN LATERAL pgflow_prefect.read_input(s.run_id, s.step_slug, 0, begin_airflow_shadow.upstream) AS i
        WHERE s.run_id = begin_airflow_shadow.run_id AND s.step_slug = begin_airflow_shadow.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.begin_airflow_shadow(uuid, text, text[]) IS
    'Lets one process execute a handler beside a completed task of Airflow''s: returns the input of the step, its result and '
    'the notes of the mirror. unread: the step, and those upstream of it, whose results were not copied. No row: another '
    'process has begun it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.release_airflow_shadow(run_id uuid, step_slug text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    UPDATE pgflow_prefect.shadow_reports h SET reported_at = '-infinity'
    WHERE h.run_id = release_airflow_shadow.run_id AND h.step_slug = release_airflow_shadow.step_slug AND h.task_index = 0
      AND h.details = ARRAY['it goes on, or its process has ended']
$$;

COMMENT ON FUNCTION pgflow_prefect.release_airflow_shadow(uuid, text) IS
    'Gives back what begin_airflow_shadow has begun: another process may begin it.';


------------------------------------------------------------------------------------------------------------
-- What Prefect is to show
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_unshown(
    workflow_slugs text[], adopt boolean, with_ended boolean, since timestamptz, besides uuid[], at_most int
) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT m.run_id
        FROM pgflow_prefect.mirrored_runs m
        WHERE m.workflow_slug = ANY (list_unshown.workflow_slugs) AND NOT m.shown AND NOT m.imported
          AND m.run_id <> ALL (list_unshown.besides)
        ORDER BY m.workflow_slug, m.source_id
        LIMIT list_unshown.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unshown(text[], boolean, boolean, timestamptz, uuid[], int) IS
    'Runs of these workflows that Airflow executes and that Prefect does not show, at most so many. Of those that were '
    'imported after their end, none. adopt, with_ended and since count on the released pgflow alone.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_observed(workflow_slugs text[], after uuid, at_most int)
RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT o.run_id
        FROM pgflow_prefect.owners o
        JOIN pgflow_prefect.mirrored_runs m ON m.run_id = o.run_id
        WHERE NOT o.settled AND m.shown AND NOT m.executed_here AND m.workflow_slug = ANY (list_observed.workflow_slugs)
          AND (list_observed.after IS NULL OR o.run_id > list_observed.after)
        ORDER BY o.run_id
        LIMIT list_observed.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_observed(text[], uuid, int) IS
    'Runs of these workflows that another program executes and that Prefect shows, but not yet their end, by id.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_map_tasks(run_id uuid, at_most int)
RETURNS TABLE (step_slug text, task_index int, status text, ended_as text, attempts int, error_message text,
               created_at timestamptz, started_at timestamptz, finished_at timestamptz, task_state text, handler text,
               skip_reason text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT i.step_slug, i.item_index, i.status, NULL::text, i.attempts, i.error_message, i.started_at, i.started_at,
               i.finished_at, NULL::text, NULL::text, i.skip_reason
        FROM pgflow.step_maps m
        JOIN pgflow.step_items i ON i.run_id = m.run_id AND i.step_slug = m.step_slug
        WHERE m.run_id = list_map_tasks.run_id AND m.total <= list_map_tasks.at_most
          AND (i.attempts > 0 OR i.status <> 'pending')
        ORDER BY i.step_slug, i.item_index;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_map_tasks(uuid, int) IS
    'The tasks of the maps of a run that were begun or have ended, of maps with at most so many; how each stands.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_prefect');
END
$rights$;

COMMIT;

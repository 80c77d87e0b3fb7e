-- pgflow_prefect: runs that execute in PostgreSQL only, and that Prefect hears of later or never.
--
-- A part of the contract of ../CONTRACT.md for the classic schema. Needs pgflow.sql, classic/pgflow_prefect.sql and
-- classic/definitions.sql, whose head says how these functions are planned.
-- psql -d DATABASE -f recording.sql; one transaction, safe to run again.
--
-- An unshown run has an owner like any other run. Its owner's flow_run_id is a placeholder, a UUID of version 8, which
-- no server of Prefect gives out. The table flow_runs has no row for it. Once Prefect has a flow run for the run,
-- link_recorded_runs puts that one's id in the place of the placeholder.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.owners') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect is missing'
            USING HINT = 'Run pgflow.sql and classic/pgflow_prefect.sql first.';
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



CREATE OR REPLACE FUNCTION pgflow_prefect.is_unshown(flow_run_id uuid) RETURNS boolean
LANGUAGE sql IMMUTABLE -- no SET clause, so that PostgreSQL can inline it
AS $$
    SELECT coalesce(pg_catalog.substr(flow_run_id::pg_catalog.text, 15, 1) OPERATOR(pg_catalog.=) '8', false)
$$;

COMMENT ON FUNCTION pgflow_prefect.is_unshown(uuid) IS
    'True for the placeholder of a flow run: Prefect was not told of the run. A UUID of version 8 is one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.begin_unshown_runs(
    run_ids uuid[], epochs int[], placeholders uuid[], held_by text
) RETURNS TABLE (run_id uuid, linked boolean, shown boolean, status text, remaining int, definition_id bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_custom_plan -- as in link_flow_runs
AS $$
#variable_conflict use_column
DECLARE
    begun record;
BEGIN
    FOR begun IN
        SELECT u.run_id, u.epoch, u.placeholder
        FROM unnest(run_ids, epochs, placeholders) AS u (run_id, epoch, placeholder)
        ORDER BY u.run_id -- so that two processes never wait for each other
    LOOP
        run_id := begun.run_id;
        linked := false;
        shown := EXISTS (SELECT FROM pgflow_prefect.flow_runs f WHERE f.run_id = begun.run_id);
        IF NOT shown THEN
            UPDATE pgflow_prefect.owners o
            SET flow_run_id = begun.placeholder
            WHERE o.run_id = begun.run_id AND o.epoch = begun.epoch AND o.held_by = begin_unshown_runs.held_by
              AND (o.flow_run_id IS NULL OR o.flow_run_id = begun.placeholder); -- again, after a lost answer
            linked := FOUND;
        END IF;
        status := NULL;
        remaining := NULL;
        definition_id := NULL;
        SELECT r.status, r.remaining, r.definition_id INTO status, remaining, definition_id
        FROM pgflow.runs r WHERE r.id = begun.run_id;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.begin_unshown_runs(uuid[], int[], uuid[], text) IS
    'link_flow_runs for runs that Prefect is not told of. A run that Prefect was ever shown is not linked, and '
    'its `shown` is true.';


CREATE OR REPLACE FUNCTION pgflow_prefect.link_recorded_runs(
    run_ids uuid[], epochs int[], flow_run_ids uuid[]
) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    recorded record;
BEGIN
    FOR recorded IN
        SELECT u.run_id, u.epoch, u.flow_run_id
        FROM unnest(link_recorded_runs.run_ids, link_recorded_runs.epochs, link_recorded_runs.flow_run_ids)
            AS u (run_id, epoch, flow_run_id)
        ORDER BY u.run_id
    LOOP
        UPDATE pgflow_prefect.owners o
        SET flow_run_id = recorded.flow_run_id, settled = false -- what Prefect was told is yet to be compared
        WHERE o.run_id = recorded.run_id AND o.epoch = recorded.epoch AND pgflow_prefect.is_unshown(o.flow_run_id);
        IF FOUND THEN
            PERFORM pgflow_prefect.note_flow_run(recorded.run_id, recorded.epoch, recorded.flow_run_id);
            UPDATE pgflow_prefect.mirrored_runs m SET shown = true WHERE m.run_id = recorded.run_id;
            RETURN NEXT recorded.run_id;
        END IF;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.link_recorded_runs(uuid[], int[], uuid[]) IS
    'Names the flow runs that now show runs without one, and returns the runs that this call has linked. It '
    'leaves runs alone that another process has shown or taken meanwhile.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_left_unshown(
    workflow_slugs text[], grace double precision, after uuid, at_most int
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, status text, seconds double precision)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT o.run_id, r.workflow_slug, o.epoch, r.status,
               extract(epoch FROM r.finished_at - o.taken_at)::double precision
        FROM pgflow_prefect.owners o
        JOIN pgflow.runs r ON r.id = o.run_id AND r.epoch = o.epoch
        WHERE NOT o.settled AND pgflow_prefect.is_unshown(o.flow_run_id)
          AND r.status <> 'pending' AND r.workflow_slug = ANY (list_left_unshown.workflow_slugs)
          AND (r.finished_at < clock_timestamp() - make_interval(secs => grace)) IS NOT FALSE
          AND (list_left_unshown.after IS NULL OR o.run_id > list_left_unshown.after)
          AND NOT EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m WHERE m.run_id = o.run_id OFFSET 0) -- its mirror does
        ORDER BY o.run_id
        LIMIT list_left_unshown.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_left_unshown(text[], double precision, uuid, int) IS
    'Runs that ended `grace` seconds ago or earlier, that Prefect was not told of, and for which no process has '
    'decided yet whether to tell it, by id. seconds: how long their last owner held them.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_unrecorded(
    workflow_slug text, status text, only_ended_as text, since timestamptz, after_finished timestamptz, after uuid,
    at_most int
) RETURNS TABLE (run_id uuid, finished_at timestamptz)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.finished_at
        FROM pgflow.runs r
        JOIN pgflow_prefect.owners o ON o.run_id = r.id AND o.epoch = r.epoch
        WHERE r.workflow_slug = list_unrecorded.workflow_slug AND r.status = list_unrecorded.status
          AND r.status <> 'pending' -- for the index
          AND r.finished_at >= list_unrecorded.since
          AND r.finished_at >= coalesce(list_unrecorded.after_finished, list_unrecorded.since)
          AND (list_unrecorded.after IS NULL
               OR (r.finished_at, r.id) > (list_unrecorded.after_finished, list_unrecorded.after))
          AND (list_unrecorded.only_ended_as IS NULL OR r.ended_as::text = list_unrecorded.only_ended_as)
          AND pgflow_prefect.is_unshown(o.flow_run_id)
        ORDER BY r.finished_at, r.id
        LIMIT list_unrecorded.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unrecorded(text, text, text, timestamptz, timestamptz, uuid, int) IS
    'Runs of a workflow that have ended in this status since then, and that Prefect was never shown, in the order of '
    'their ends, behind (after_finished, after).';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_unrecorded(run_ids uuid[])
RETURNS TABLE (id uuid, workflow_slug text, epoch int, status text, ended_as text, error_message text,
               created_at timestamptz, taken_at timestamptz, finished_at timestamptz, definition_id bigint,
               step_count int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.workflow_slug, r.epoch, r.status, r.ended_as::text, r.error_message, r.created_at, o.taken_at,
               r.finished_at, r.definition_id, d.step_count
        FROM pgflow_prefect.owners o
        JOIN pgflow.runs r ON r.id = o.run_id AND r.epoch = o.epoch
        LEFT JOIN pgflow.definitions d ON d.id = r.definition_id
        WHERE o.run_id = ANY (read_unrecorded.run_ids) AND pgflow_prefect.is_unshown(o.flow_run_id);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_unrecorded(uuid[]) IS 'Those of these runs that Prefect was never shown.';


DO $skips$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_proc
               WHERE oid = to_regprocedure('pgflow_prefect.list_unrecorded_steps(uuid[])')
                 AND 'skip_reason' <> ALL (proargnames)) THEN
        DROP FUNCTION pgflow_prefect.list_unrecorded_steps(uuid[]); -- what it returns can't be changed in place
    END IF;
END
$skips$;


CREATE OR REPLACE FUNCTION pgflow_prefect.list_unrecorded_steps(run_ids uuid[])
RETURNS TABLE (run_id uuid, step_slug text, task_index int, status text, ended_as text, attempts int,
               error_message text, created_at timestamptz, started_at timestamptz, finished_at timestamptz,
               task_state text, handler text, first_claimed_at timestamptz, task_run_id uuid, skip_reason text,
               skip_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.run_id, s.step_slug, coalesce(t.task_index, 0), s.status, s.ended_as::text, s.attempts, s.error_message,
               s.created_at, s.started_at, s.finished_at, t.state_name, t.handler, t.first_claimed_at, t.task_run_id,
               s.skip_reason, pgflow_prefect.describe_skip(s)
        FROM pgflow.step_states s
        LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug
        WHERE s.run_id = ANY (list_unrecorded_steps.run_ids) AND (t.run_id IS NOT NULL OR s.skip_reason IS NOT NULL)
        ORDER BY s.run_id, coalesce(t.first_claimed_at, s.started_at, s.created_at), s.step_slug, t.task_index;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unrecorded_steps(uuid[]) IS
    'The steps of these runs that a task run has claimed, or that were skipped or not run without one, in the order of '
    'their first claims, without their results.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_prefect');
END
$rights$;

COMMIT;

-- pgflow_prefect on the released pgflow (pgflow.dev): which flows Prefect shows, and what it was told of them.
--
-- A part of the contract of ../CONTRACT.md; needs bindings.sql. Its tables are in the schema pgflow_prefect, and no
-- foreign key leads from them to a table of pgflow: that would put triggers on it. So rows of runs that pgflow has deleted
-- stay until `forget_deleted_runs` finds them.
-- psql -d DATABASE -f pgflow_prefect.sql -f moving.sql -f steps.sql -f executing.sql -f bindings.sql -f observing.sql; safe to
-- run again.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.binding_changes') IS NULL THEN
        RAISE EXCEPTION 'the functions of pgflow_prefect for the released pgflow are missing'
            USING HINT = 'Run pgflow_prefect.sql, moving.sql, executing.sql and bindings.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0'; -- PostgreSQL 17 has it
    -- This locks the schema itself: two installations at once take turns.
    COMMENT ON SCHEMA pgflow_prefect IS 'What pgflow-prefect reads and executes of the released pgflow, and what Prefect was told.';
END
$guard$;


-- This database among those that share a Prefect server.
CREATE TABLE IF NOT EXISTS pgflow_prefect.installation (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    is_only_row BOOLEAN NOT NULL DEFAULT true UNIQUE CHECK (is_only_row),
    stamp TEXT,                            -- of the database that the row was made for
    former_stamps TEXT[] NOT NULL DEFAULT '{}'
);

-- Signs of life of the processes that show runs: without a row, nothing was ever written to Prefect.
CREATE TABLE IF NOT EXISTS pgflow_prefect.heartbeats (
    is_only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (is_only_row),
    beats UUID[] NOT NULL DEFAULT '{}',    -- the newest first
    beat_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

-- The flows whose runs Prefect shows, if the runs began after `since`.
CREATE TABLE IF NOT EXISTS pgflow_prefect.enabled_workflows (
    workflow_slug TEXT PRIMARY KEY,
    enabled BOOLEAN NOT NULL DEFAULT true,
    since TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

-- The flow run that shows a run.
CREATE TABLE IF NOT EXISTS pgflow_prefect.flow_runs (
    run_id UUID PRIMARY KEY,
    flow_run_id UUID NOT NULL,
    settled BOOLEAN NOT NULL DEFAULT false, -- the run has ended, and Prefect shows its end
    shown_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX IF NOT EXISTS flow_runs_unsettled ON pgflow_prefect.flow_runs (run_id) WHERE NOT settled;


------------------------------------------------------------------------------------------------------------
-- The installation. A copy of a database has the id of the original: it must not touch what that shows in Prefect.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.current_stamp() RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    cluster text := '?';
BEGIN
    BEGIN
        SELECT c.system_identifier INTO cluster FROM pg_control_system() c;
    EXCEPTION WHEN insufficient_privilege OR undefined_function THEN
        NULL; -- the database's oid is enough then
    END;
    RETURN cluster || '/' || (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
END
$$;

COMMENT ON FUNCTION pgflow_prefect.current_stamp() IS
    'Tells this database from a restored or cloned one, by the cluster''s system identifier and the database''s oid. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_same_stamp(stamp text, other text) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT split_part(stamp, '/', 2) = split_part(other, '/', 2)
       AND (split_part(stamp, '/', 1) = split_part(other, '/', 1) OR '?' IN (split_part(stamp, '/', 1), split_part(other, '/', 1)))
$$;

COMMENT ON FUNCTION pgflow_prefect.is_same_stamp(text, text) IS
    'True if two stamps are of one database. A cluster that a role could not read (?) decides nothing. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_installation()
RETURNS TABLE (id uuid, stamp text, current_stamp text, former_stamps text[], fits boolean, is_used boolean)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT i.id, i.stamp, c.stamp, i.former_stamps, coalesce(pgflow_prefect.is_same_stamp(i.stamp, c.stamp), false),
           EXISTS (SELECT FROM pgflow_prefect.heartbeats)
    FROM pgflow_prefect.installation i, pgflow_prefect.current_stamp() AS c (stamp)
$$;

COMMENT ON FUNCTION pgflow_prefect.read_installation() IS
    'This installation. fits: its stamp is of this database, which is no copy. is_used: it has written to Prefect.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_installation() RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    IF EXISTS (SELECT FROM pgflow_prefect.heartbeats)
       OR NOT has_table_privilege('pgflow_prefect.installation', 'UPDATE') THEN -- the owner's `init` does it, then
        RETURN false;
    END IF;
    UPDATE pgflow_prefect.installation i SET id = gen_random_uuid(), stamp = pgflow_prefect.current_stamp()
    WHERE NOT pgflow_prefect.is_same_stamp(i.stamp, pgflow_prefect.current_stamp());
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_installation() IS
    'Gives a copy an id of its own if the original was never used with Prefect. Otherwise changes nothing. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.use_installation()
RETURNS TABLE (id uuid, stamp text, current_stamp text, former_stamps text[], fits boolean, is_used boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    SELECT * INTO id, stamp, current_stamp, former_stamps, fits, is_used FROM pgflow_prefect.read_installation();
    IF NOT fits AND NOT is_used THEN
        PERFORM pgflow_prefect.claim_installation(); -- another session may do it at this moment
        SELECT * INTO id, stamp, current_stamp, former_stamps, fits, is_used FROM pgflow_prefect.read_installation();
    END IF;
    IF fits AND NOT is_used THEN
        INSERT INTO pgflow_prefect.heartbeats DEFAULT VALUES ON CONFLICT DO NOTHING;
    END IF;
    IF id IS NOT NULL THEN
        RETURN NEXT;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.use_installation() IS
    'read_installation for a process that will write to Prefect: after this, the installation counts as used.';


CREATE OR REPLACE FUNCTION pgflow_prefect.new_installation() RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    new_id uuid;
BEGIN
    UPDATE pgflow_prefect.installation
    SET id = gen_random_uuid(), stamp = pgflow_prefect.current_stamp(), former_stamps = '{}' RETURNING id INTO new_id;
    TRUNCATE pgflow_prefect.flow_runs, pgflow_prefect.heartbeats, pgflow_prefect.run_owners, pgflow_prefect.run_flow_runs,
             pgflow_prefect.task_runs, pgflow_prefect.set_aside_runs; -- they belong to the original
    -- The first owner here gets epoch 1. It takes over what an owner of the original had begun.
    UPDATE pgflow_prefect.item_claims SET epoch = 0, due_at = NULL;
    UPDATE pgflow_prefect.enabled_workflows SET since = clock_timestamp();
    RETURN new_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.new_installation() IS
    'Makes this copy of a database an installation of its own, with a new id and nothing of the original''s in Prefect. '
    'Stop its services first.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_installation() RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    UPDATE pgflow_prefect.installation i
    SET former_stamps = i.former_stamps || i.stamp, stamp = pgflow_prefect.current_stamp()
    WHERE NOT pgflow_prefect.is_same_stamp(i.stamp, pgflow_prefect.current_stamp());
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_installation() IS
    'Lets this database, restored or upgraded, replace the one that it is a copy of, which is gone. False if it is no '
    'copy.';


CREATE OR REPLACE FUNCTION pgflow_prefect.beat(beat uuid, every double precision) RETURNS uuid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO pgflow_prefect.heartbeats AS h (beats) VALUES (ARRAY[beat.beat])
    ON CONFLICT (is_only_row) DO UPDATE
    SET beats = (beat.beat || h.beats)[1:100], beat_at = clock_timestamp()
    WHERE cardinality(h.beats) = 0 OR h.beat_at < clock_timestamp() - make_interval(secs => every);
    RETURN (SELECT h.beats FROM pgflow_prefect.heartbeats h);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.beat(uuid, double precision) IS
    'Notes a sign of life, unless another service gave one within so many seconds; returns the latest, newest first.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_beats() RETURNS uuid[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$ SELECT coalesce((SELECT h.beats FROM pgflow_prefect.heartbeats h), '{}') $$;

COMMENT ON FUNCTION pgflow_prefect.list_beats() IS 'The latest signs of life, newest first.';


------------------------------------------------------------------------------------------------------------
-- Which flows are shown
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_enabled()
RETURNS TABLE (workflow_slug text, enabled boolean, since timestamptz)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT e.workflow_slug, e.enabled, e.since FROM pgflow_prefect.enabled_workflows e ORDER BY e.workflow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_enabled() IS 'The flows that were enabled or disabled.';


CREATE OR REPLACE FUNCTION pgflow_prefect.enable_workflow(workflow_slug text, enabled boolean DEFAULT true)
RETURNS pgflow_prefect.enabled_workflows
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    row pgflow_prefect.enabled_workflows;
BEGIN
    PERFORM FROM pgflow.flows f WHERE f.flow_slug = enable_workflow.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO pgflow_prefect.enabled_workflows AS e (workflow_slug, enabled)
    VALUES (enable_workflow.workflow_slug, enable_workflow.enabled)
    ON CONFLICT (workflow_slug) DO UPDATE
    SET enabled = excluded.enabled,
        since = CASE WHEN e.enabled = excluded.enabled THEN e.since ELSE excluded.since END -- no change if repeated
    RETURNING e.* INTO row;
    RETURN row;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.enable_workflow(text, boolean) IS
    'Lets Prefect show this flow''s runs that begin from now on; false: those that begin are not shown.';


CREATE OR REPLACE FUNCTION pgflow_prefect.enable_workflows(workflow_slugs text[])
RETURNS SETOF pgflow_prefect.enabled_workflows
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN QUERY
        SELECT e.* FROM unnest(enable_workflows.workflow_slugs) AS wanted (slug)
        CROSS JOIN LATERAL pgflow_prefect.enable_workflow(wanted.slug, true) e;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.enable_workflows(text[]) IS
    'Lets workers and bridges take the new runs of several workflows.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_older_runs(workflow_slugs text[], lease double precision)
RETURNS TABLE (id uuid, workflow_slug text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.run_id, r.flow_slug FROM pgflow.runs r
        JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.flow_slug AND e.enabled
        WHERE r.status = 'started' AND r.flow_slug = ANY (list_older_runs.workflow_slugs) AND r.started_at < e.since
          -- Of a moved flow, a worker takes all runs.
          AND NOT EXISTS (SELECT FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = r.flow_slug AND m.is_ours)
          AND NOT EXISTS (SELECT FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.run_id)
        ORDER BY r.flow_slug, r.started_at, r.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_older_runs(text[], double precision) IS
    'Runs of these flows that go on, began before the flow was enabled, and are not shown.';


------------------------------------------------------------------------------------------------------------
-- Runs that Prefect shows, or is yet to show
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_unshown(
    workflow_slugs text[], adopt boolean, with_ended boolean, since timestamptz, besides uuid[], at_most int
) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    -- pgflow has an index by status and one by flow. Few runs go on, so the first look is cheap at any size.
    RETURN QUERY
        SELECT r.run_id
        FROM pgflow.runs r
        JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.flow_slug AND e.enabled
        WHERE r.status = 'started' AND r.flow_slug = ANY (list_unshown.workflow_slugs)
          AND (list_unshown.adopt OR r.started_at >= e.since) AND r.run_id <> ALL (list_unshown.besides)
          AND NOT EXISTS (SELECT FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.run_id)
          -- A worker of ours shows the runs that it executes.
          AND NOT EXISTS (SELECT FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = r.flow_slug AND m.is_ours)
        ORDER BY r.started_at, r.run_id
        LIMIT list_unshown.at_most;
    IF list_unshown.with_ended THEN
        RETURN QUERY
            SELECT r.run_id
            FROM pgflow.runs r
            JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.flow_slug AND e.enabled
            WHERE r.status <> 'started' AND r.flow_slug = ANY (list_unshown.workflow_slugs)
              AND r.started_at >= greatest(e.since, list_unshown.since) AND r.run_id <> ALL (list_unshown.besides)
              AND NOT EXISTS (SELECT FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.run_id)
            ORDER BY r.started_at, r.run_id
            LIMIT list_unshown.at_most;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unshown(text[], boolean, boolean, timestamptz, uuid[], int) IS
    'Runs of these flows that Prefect does not show and that began since their flow was enabled, the oldest first: those '
    'that go on, at most so many, and then those that have ended, likewise. adopt: older ones that go on, too. since: ended '
    'ones that began before that are left out; this part reads all runs of the flows.';


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
        SELECT r.run_id, e.finished_at
        FROM pgflow.runs r CROSS JOIN LATERAL (SELECT coalesce(r.completed_at, r.failed_at) OFFSET 0) e (finished_at)
        WHERE r.flow_slug = list_unrecorded.workflow_slug AND r.status = list_unrecorded.status
          AND r.status IN ('completed', 'failed')
          AND list_unrecorded.only_ended_as IS NULL -- pgflow ends runs by completion and failure alone
          AND e.finished_at >= list_unrecorded.since
          AND (list_unrecorded.after IS NULL
               OR (e.finished_at, r.run_id) > (list_unrecorded.after_finished, list_unrecorded.after))
          AND NOT EXISTS (SELECT FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.run_id)
        ORDER BY e.finished_at, r.run_id
        LIMIT list_unrecorded.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unrecorded(text, text, text, timestamptz, timestamptz, uuid, int) IS
    'Runs of a flow that have ended in this status since then, and that Prefect was never shown, in the order of their '
    'ends, behind (after_finished, after).';


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
        SELECT r.run_id, r.flow_slug, 0, CASE WHEN r.status IN ('completed', 'failed') THEN r.status ELSE 'pending' END,
               NULL::text, CASE WHEN r.status = 'failed' THEN pgflow_prefect.describe_failure(r.run_id) END,
               r.started_at, r.started_at, coalesce(r.completed_at, r.failed_at), NULL::bigint,
               (SELECT count(*) FROM pgflow.step_states s WHERE s.run_id = r.run_id)::int
        FROM pgflow.runs r
        WHERE r.run_id = ANY (read_unrecorded.run_ids)
          AND NOT EXISTS (SELECT FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.run_id);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_unrecorded(uuid[]) IS 'Those of these runs that Prefect was never shown.';


CREATE OR REPLACE FUNCTION pgflow_prefect.link_recorded_runs(
    run_ids uuid[], epochs int[], flow_run_ids uuid[]
) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        INSERT INTO pgflow_prefect.flow_runs AS f (run_id, flow_run_id)
        SELECT u.run_id, u.flow_run_id
        FROM unnest(link_recorded_runs.run_ids, link_recorded_runs.flow_run_ids) AS u (run_id, flow_run_id)
        ORDER BY u.run_id
        ON CONFLICT DO NOTHING
        RETURNING f.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.link_recorded_runs(uuid[], int[], uuid[]) IS
    'Names the flow runs that now show runs, and returns the runs that this call has linked.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_flow_runs(run_id uuid) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT k.flow_run_id FROM (
            SELECT f.flow_run_id, f.shown_at AS since, 1 AS turn FROM pgflow_prefect.flow_runs f
            WHERE f.run_id = list_flow_runs.run_id
              AND NOT EXISTS (SELECT FROM pgflow_prefect.run_flow_runs e WHERE e.run_id = f.run_id)
            UNION ALL
            SELECT e.flow_run_id, e.taken_at, 0 FROM pgflow_prefect.run_flow_runs e
            WHERE e.run_id = list_flow_runs.run_id) k
        ORDER BY k.turn, k.since;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_flow_runs(uuid) IS 'The flow runs that have executed a run, in that order, or the one that shows it; no row: there is none.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_unsettled(everything boolean, after uuid, at_most int)
RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT f.run_id FROM pgflow_prefect.flow_runs f
        WHERE (list_unsettled.everything OR NOT f.settled)
          AND (list_unsettled.after IS NULL OR f.run_id > list_unsettled.after)
        ORDER BY f.run_id
        LIMIT list_unsettled.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unsettled(boolean, uuid, int) IS
    'Runs that Prefect shows, and whose end it does not show yet, by id; everything: all that it shows.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_observed(workflow_slugs text[], after uuid, at_most int)
RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT f.run_id FROM pgflow_prefect.flow_runs f
        JOIN pgflow.runs r ON r.run_id = f.run_id AND r.flow_slug = ANY (list_observed.workflow_slugs)
        WHERE NOT f.settled AND (list_observed.after IS NULL OR f.run_id > list_observed.after)
        ORDER BY f.run_id
        LIMIT list_observed.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_observed(text[], uuid, int) IS
    'Runs of these workflows that another program executes and that Prefect shows, but not yet their end, by id.';


CREATE OR REPLACE FUNCTION pgflow_prefect.settle_runs(run_ids uuid[], epochs int[])
RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        UPDATE pgflow_prefect.flow_runs f SET settled = true
        WHERE f.run_id = ANY (settle_runs.run_ids) AND NOT f.settled
          AND NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = f.run_id AND r.status NOT IN ('completed', 'failed'))
          -- Not one that a process has taken since.
          AND NOT EXISTS (SELECT FROM pgflow_prefect.run_owners o
                          JOIN unnest(settle_runs.run_ids, settle_runs.epochs) AS seen (run_id, epoch)
                              ON seen.run_id = o.run_id AND seen.epoch < o.epoch
                          WHERE o.run_id = f.run_id)
        RETURNING f.run_id;
    UPDATE pgflow_prefect.run_owners o SET settled = true
    FROM unnest(settle_runs.run_ids, settle_runs.epochs) AS seen (run_id, epoch)
    WHERE o.run_id = seen.run_id AND o.epoch = seen.epoch AND NOT o.settled
      AND NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = o.run_id AND r.status NOT IN ('completed', 'failed'));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.settle_runs(uuid[], int[]) IS
    'Notes that Prefect shows how these runs have ended, and returns those that this call has noted.';


CREATE OR REPLACE FUNCTION pgflow_prefect.forget_deleted_runs(after uuid, at_most int) RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    last uuid;
BEGIN
    WITH next_rows AS (
        SELECT f.run_id FROM pgflow_prefect.flow_runs f
        WHERE forget_deleted_runs.after IS NULL OR f.run_id > forget_deleted_runs.after
        ORDER BY f.run_id LIMIT forget_deleted_runs.at_most
    ), gone AS (
        DELETE FROM pgflow_prefect.flow_runs f USING next_rows s
        WHERE f.run_id = s.run_id AND NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = s.run_id)
        RETURNING f.run_id
    ), owners AS (
        DELETE FROM pgflow_prefect.run_owners o USING gone g WHERE o.run_id = g.run_id
    ), taken AS (
        DELETE FROM pgflow_prefect.run_flow_runs o USING gone g WHERE o.run_id = g.run_id
    ), claimed AS (
        DELETE FROM pgflow_prefect.task_runs o USING gone g WHERE o.run_id = g.run_id
    ), items AS (
        DELETE FROM pgflow_prefect.item_claims o USING gone g WHERE o.run_id = g.run_id
    ), aside AS (
        DELETE FROM pgflow_prefect.set_aside_runs o USING gone g WHERE o.run_id = g.run_id
    )
    SELECT s.run_id INTO last FROM next_rows s ORDER BY s.run_id DESC LIMIT 1;
    RETURN last;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.forget_deleted_runs(uuid, int) IS
    'Deletes the rows of runs that pgflow has deleted, among the next ones behind this id, and returns the last id that it '
    'has looked at. NULL: there is none behind it.';


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
        SELECT t.step_slug, t.task_index,
               CASE WHEN t.status IN ('completed', 'skipped') THEN 'completed'
                    WHEN t.status IN ('failed', 'cancelled') THEN 'failed' ELSE 'pending' END,
               CASE t.status WHEN 'cancelled' THEN 'cancelled' END, t.attempts_count,
               CASE WHEN t.status IN ('queued', 'failed') THEN t.error_message END, t.queued_at, t.started_at,
               coalesce(t.completed_at, t.failed_at), CASE t.status WHEN 'queued' THEN 'AwaitingRetry' END,
               (SELECT w.function_name FROM pgflow.workers w WHERE w.worker_id = t.last_worker_id),
               CASE t.status WHEN 'skipped' THEN 'skipped' END
        FROM pgflow.step_states s
        JOIN pgflow.steps d ON d.flow_slug = s.flow_slug AND d.step_slug = s.step_slug AND d.step_type = 'map'
        JOIN pgflow.step_tasks t ON t.run_id = s.run_id AND t.step_slug = s.step_slug
        WHERE s.run_id = list_map_tasks.run_id AND s.initial_tasks <= list_map_tasks.at_most
          AND (t.attempts_count > 0 OR t.status NOT IN ('queued', 'started'))
        ORDER BY t.step_slug, t.task_index;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_map_tasks(uuid, int) IS
    'The tasks of the maps of a run that were begun or have ended, of maps with at most so many; how each stands.';


------------------------------------------------------------------------------------------------------------
-- What `doctor` asks, and the options of tasks, which `export` writes
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_task_options(workflow_slug text)
RETURNS TABLE (step_slug text, max_attempts int, base_delay int, timeout int, start_delay int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT NULL::text, f.opt_max_attempts, f.opt_base_delay, f.opt_timeout, NULL::int
        FROM pgflow.flows f WHERE f.flow_slug = list_task_options.workflow_slug
        UNION ALL
        (SELECT s.step_slug, s.opt_max_attempts, s.opt_base_delay, s.opt_timeout, s.opt_start_delay
         FROM pgflow.steps s WHERE s.flow_slug = list_task_options.workflow_slug ORDER BY s.step_index);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_task_options(text) IS
    'The options of a flow''s tasks, in seconds: first those of the flow, without a step, then those of each step; NULL: as '
    'the flow has it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_queues()
RETURNS TABLE (workflow_slug text, queued bigint, oldest timestamptz, started bigint, live_workers bigint, last_heartbeat_at timestamptz,
               functions text[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY EXECUTE format($query$
        SELECT f.flow_slug, coalesce(t.queued, 0), t.oldest, coalesce(t.started, 0), coalesce(w.live, 0),
               w.last_heartbeat_at, coalesce(w.functions, '{}')
        FROM pgflow.flows f
        LEFT JOIN (
            SELECT i.flow_slug, count(*) FILTER (WHERE i.status = 'queued') AS queued,
                   min(i.queued_at) FILTER (WHERE i.status = 'queued') AS oldest,
                   count(*) FILTER (WHERE i.status = 'started') AS started
            FROM pgflow.step_tasks i JOIN pgflow.runs r ON r.run_id = i.run_id AND r.status = 'started'
            WHERE i.status IN ('queued', 'started') GROUP BY i.flow_slug) t ON t.flow_slug = f.flow_slug
        LEFT JOIN (
            -- A worker gives a sign of life every 5 s. One that is deprecated takes no more tasks.
            SELECT k.queue_name, max(k.last_heartbeat_at) AS last_heartbeat_at,
                   count(*) FILTER (WHERE k.last_heartbeat_at > clock_timestamp() - interval '30 seconds'
                                      AND k.deprecated_at IS NULL AND %s IS NULL) AS live,
                   array_agg(DISTINCT k.function_name ORDER BY k.function_name) AS functions
            FROM pgflow.workers k GROUP BY k.queue_name) w ON w.queue_name = f.flow_slug
        ORDER BY f.flow_slug
        $query$, pgflow_prefect.find_column('workers', 'stopped_at', 'k', 'timestamptz'));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_queues() IS
    'Each flow with its tasks that are queued or under way, since when the oldest one waits, how many of its workers have '
    'given a sign of life in the last 30 s, and the functions that have ever worked on it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_stalled_tasks(at_most int)
RETURNS TABLE (workflow_slug text, run_id uuid, step_slug text, task_index int, started_at timestamptz,
               requeued int, is_given_up boolean, tasks bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY EXECUTE format($query$
        SELECT t.flow_slug, t.run_id, t.step_slug, t.task_index, t.started_at, coalesce(%1$s, 0), %2$s IS NOT NULL,
               count(*) OVER ()
        FROM pgflow.step_tasks t
        JOIN pgflow.runs r ON r.run_id = t.run_id AND r.status = 'started'
        JOIN pgflow.flows f ON f.flow_slug = t.flow_slug
        JOIN pgflow.steps s ON s.flow_slug = t.flow_slug AND s.step_slug = t.step_slug
        WHERE t.status = 'started'
          -- A lease tells whether a worker of ours lives.
          AND NOT EXISTS (SELECT FROM pgflow_prefect.moved_flows m
                          WHERE m.flow_slug = t.flow_slug AND m.is_ours AND m.worker_id = t.last_worker_id)
          AND (%2$s IS NOT NULL -- pgflow puts a task back 30 s after its time is over
               OR t.started_at < clock_timestamp()
                                 - make_interval(secs => greatest(coalesce(s.opt_timeout, f.opt_timeout), f.opt_timeout) + 30))
        ORDER BY %2$s IS NULL, t.started_at, t.run_id, t.step_slug, t.task_index
        LIMIT $1
        $query$, pgflow_prefect.find_column('step_tasks', 'requeued_count', 't', 'int'),
        pgflow_prefect.find_column('step_tasks', 'permanently_stalled_at', 't', 'timestamptz'))
        USING list_stalled_tasks.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_stalled_tasks(int) IS
    'Tasks that were begun, and not reported for 30 s longer than they may take, those first that pgflow has given up. '
    'tasks: how many there are in all.';


------------------------------------------------------------------------------------------------------------
-- Runs with their owners: in the last script, because an observer of a former version goes on between the scripts
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_bindings(workflow_slug text)
RETURNS TABLE (step_slug text, kind text, target text, options jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.step_slug, coalesce(b.kind, 'external'), b.target, coalesce(b.options, '{}')
        FROM pgflow.steps s
        LEFT JOIN pgflow_prefect.moved_flows m ON m.flow_slug = s.flow_slug AND m.is_ours
        LEFT JOIN pgflow_prefect.moved_steps p ON p.flow_slug = s.flow_slug AND p.step_slug = s.step_slug
        LEFT JOIN pgflow_prefect.bindings b ON b.workflow_slug = m.flow_slug AND b.step_slug = s.step_slug
                                           AND (NOT m.by_steps OR p.step_slug IS NOT NULL)
        WHERE s.flow_slug = list_bindings.workflow_slug AND (m.flow_slug IS NULL OR m.by_steps OR b.step_slug IS NOT NULL)
        ORDER BY s.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_bindings(text) IS
    'The bindings of a moved flow, as rows say. Of another flow, all steps are external that were not moved alone: pgflow''s '
    'own workers do them.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_runs(
    only_workflow text, only_status text, only_ended_as text, since timestamptz, at_most int, lease double precision,
    with_payload boolean
) RETURNS TABLE (id uuid, workflow_slug text, status text, ended_as text, payload jsonb, payload_problem text,
               epoch int, remaining int, steps int, error_message text, created_at timestamptz, finished_at timestamptz,
               flow_run_id uuid, held_by text, recoveries int, stale_writes bigint, held text,
               logical_date timestamptz, interval_start timestamptz, interval_end timestamptz, backfill_id bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.run_id, r.flow_slug, CASE WHEN r.status IN ('completed', 'failed') THEN r.status ELSE 'pending' END,
               NULL::text, CASE WHEN p.problem IS NULL THEN p.input END, p.problem, coalesce(o.epoch, 0),
               r.remaining_steps, (SELECT count(*) FROM pgflow.step_states s WHERE s.run_id = r.run_id)::int,
               CASE WHEN r.status = 'failed' THEN pgflow_prefect.describe_failure(r.run_id) END,
               r.started_at, coalesce(r.completed_at, r.failed_at),
               (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.run_id), o.held_by,
               coalesce(o.recoveries, 0), coalesce(o.stale_writes, 0), pgflow_prefect.how_held(o, list_runs.lease),
               NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::bigint
        FROM (SELECT * FROM pgflow.runs i
              WHERE (list_runs.only_workflow IS NULL OR i.flow_slug = list_runs.only_workflow)
                AND CASE list_runs.only_status WHEN 'pending' THEN i.status NOT IN ('completed', 'failed')
                                               ELSE coalesce(i.status = list_runs.only_status, true) END
                AND list_runs.only_ended_as IS NULL -- pgflow ends runs by completion and failure alone
                AND (list_runs.since IS NULL OR i.started_at >= list_runs.since)
              ORDER BY i.started_at DESC, i.run_id
              LIMIT list_runs.at_most) r
        LEFT JOIN pgflow_prefect.run_owners o ON o.run_id = r.run_id
        LEFT JOIN LATERAL (SELECT r.input, pgflow_prefect.find_json_problem(r.input) AS problem
                           WHERE list_runs.with_payload OFFSET 0) p ON true
        ORDER BY r.started_at DESC, r.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_runs(text, text, text, timestamptz, int, double precision, boolean) IS
    'The newest runs: of one flow, in one status, begun since then; NULL: of all.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_run(run_id uuid, lease double precision, with_payload boolean)
RETURNS TABLE (id uuid, workflow_slug text, status text, ended_as text, payload jsonb, payload_problem text,
               epoch int, remaining int, steps int, error_message text, created_at timestamptz, finished_at timestamptz,
               flow_run_id uuid, held_by text, recoveries int, stale_writes bigint, held text, set_aside text,
               next_try timestamptz, is_older boolean, logical_date timestamptz, interval_start timestamptz,
               interval_end timestamptz, backfill_id bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.run_id, r.flow_slug, CASE WHEN r.status IN ('completed', 'failed') THEN r.status ELSE 'pending' END,
               NULL::text, CASE WHEN p.problem IS NULL THEN p.input END, p.problem, coalesce(o.epoch, 0),
               r.remaining_steps, (SELECT count(*) FROM pgflow.step_states s WHERE s.run_id = r.run_id)::int,
               CASE WHEN r.status = 'failed' THEN pgflow_prefect.describe_failure(r.run_id) END,
               r.started_at, coalesce(r.completed_at, r.failed_at),
               (SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f WHERE f.run_id = r.run_id), o.held_by,
               coalesce(o.recoveries, 0), coalesce(o.stale_writes, 0), pgflow_prefect.how_held(o, read_run.lease),
               a.reason, a.next_try, false, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::bigint
        FROM pgflow.runs r
        LEFT JOIN pgflow_prefect.run_owners o ON o.run_id = r.run_id
        LEFT JOIN pgflow_prefect.set_aside_runs a
            ON a.run_id = r.run_id AND a.epoch = coalesce(o.epoch, 0) AND r.status = 'started'
            AND coalesce(pgflow_prefect.how_held(o, read_run.lease), 'released') IN ('released', 'expired')
        LEFT JOIN LATERAL (SELECT r.input, pgflow_prefect.find_json_problem(r.input) AS problem
                           WHERE read_run.with_payload OFFSET 0) p ON true
        WHERE r.run_id = read_run.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_run(uuid, double precision, boolean) IS 'A run. No row: there is no such run.';


------------------------------------------------------------------------------------------------------------
-- The version, and rights: the owner's alone, until a role is granted EXECUTE
------------------------------------------------------------------------------------------------------------

INSERT INTO pgflow_prefect.installation (stamp) SELECT pgflow_prefect.current_stamp()
WHERE NOT EXISTS (SELECT FROM pgflow_prefect.installation);
DO $copied$ BEGIN PERFORM pgflow_prefect.claim_installation(); END $copied$;

DO $former$
DECLARE
    version int := 0;
BEGIN
    IF to_regprocedure('pgflow_prefect.adapter_version()') IS NOT NULL THEN
        EXECUTE 'SELECT pgflow_prefect.adapter_version()' INTO version;
    END IF;
    PERFORM set_config('pgflow_prefect.former_version', version::text, true);
END
$former$;

CREATE OR REPLACE FUNCTION pgflow_prefect.adapter_version() RETURNS int
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$ SELECT 10 $$;

COMMENT ON FUNCTION pgflow_prefect.adapter_version() IS 'Version of these scripts: a higher one upgrades a lower one.';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgflow_prefect FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA pgflow_prefect FROM PUBLIC;

-- A role that could execute or show runs in an earlier version needs what version 10 made of that. A fresh installation has
-- no such role, and later scripts of roles take back what no role needs.
DO $handed_on$
DECLARE
    granted record;
BEGIN
    IF current_setting('pgflow_prefect.former_version')::int NOT BETWEEN 1 AND 9 THEN
        RETURN;
    END IF;
    FOR granted IN
        SELECT DISTINCT a.grantee::regrole AS who, has_table_privilege(a.grantee, 'pgflow.step_tasks', 'UPDATE') AS executes
        FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
        WHERE c.oid = 'pgflow_prefect.run_owners'::regclass AND a.grantee NOT IN (0, c.relowner)
          AND a.privilege_type = 'SELECT'
    LOOP
        EXECUTE format('GRANT SELECT ON pgflow_prefect.moved_steps, pgflow_prefect.taken_out TO %s', granted.who);
        IF granted.executes THEN
            EXECUTE format('GRANT INSERT, UPDATE, DELETE ON pgflow_prefect.taken_out TO %s', granted.who);
            EXECUTE format('GRANT UPDATE (is_swept, seen_in) ON pgflow_prefect.moved_steps TO %s', granted.who);
        END IF;
    END LOOP;
    FOR granted IN
        SELECT made.oid::regprocedure AS name, a.grantee::regrole AS who
        FROM pg_proc made
        JOIN pg_proc model ON model.pronamespace = made.pronamespace
                          AND model.proname = CASE made.provolatile WHEN 'v' THEN 'take_runs' ELSE 'list_holders' END
        CROSS JOIN LATERAL aclexplode(model.proacl) a
        WHERE made.pronamespace = 'pgflow_prefect'::regnamespace AND a.grantee NOT IN (0, model.proowner)
          AND made.proname = ANY ('{does_step,end_messages,find_lost_messages,find_queue,has_step_triggers,is_awaited,
              is_given_up,list_lost_messages,list_moved_steps,needs_guard,put_back,put_in,put_off_held_run,refuse_step_queues,
              restore_messages,sweep_step,take_out}')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', granted.name, granted.who);
    END LOOP;
END
$handed_on$;

COMMIT;

-- pgflow_prefect: backfills, as Python starts, advances and shows them.
--
-- A part of the contract of ../CONTRACT.md for the classic schema. Needs pgflow.sql and classic/pgflow_prefect.sql.
-- psql -d DATABASE -f backfills.sql; one transaction, safe to run again.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regclass('pgflow.backfills') IS NULL OR to_regclass('pgflow_prefect.owners') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow or pgflow_prefect is missing or old'
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


------------------------------------------------------------------------------------------------------------
-- Reading
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.preview_backfill(workflow_slug text, dates timestamptz[], on_existing text)
RETURNS TABLE (logical_date timestamptz, action text, run_id uuid, status text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT p.logical_date, p.action, p.run_id, p.status
        FROM pgflow.preview_backfill(preview_backfill.workflow_slug, preview_backfill.dates, preview_backfill.on_existing) p
        ORDER BY p.logical_date;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.preview_backfill(text, timestamptz[], text) IS
    'What a backfill of these dates would do with each: start, reopen or leave its run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_backfills(only_backfill bigint, only_workflow text, at_most int)
RETURNS TABLE (id bigint, workflow_slug text, status text, note text, schedule text, max_active int, on_existing text,
               newest_first boolean, stop_on_failure boolean, created_by text, created_at timestamptz,
               finished_at timestamptz, first timestamptz, last timestamptz, planned int, started int, ended int,
               left_out int, failed int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT b.id, b.workflow_slug, b.status, b.note, b.schedule, b.max_active, b.on_existing, b.newest_first,
               b.stop_on_failure, b.created_by, b.created_at, b.finished_at, d.first, d.last, d.planned, d.started, d.ended,
               d.left_out, d.failed
        FROM (SELECT * FROM pgflow.backfills i
              WHERE (list_backfills.only_backfill IS NULL OR i.id = list_backfills.only_backfill)
                AND (list_backfills.only_workflow IS NULL OR i.workflow_slug = list_backfills.only_workflow)
              ORDER BY i.id DESC LIMIT list_backfills.at_most) b
        CROSS JOIN LATERAL (
            SELECT min(i.logical_date) AS first, max(i.logical_date) AS last,
                   (count(*) FILTER (WHERE i.state = 'planned'))::int AS planned,
                   (count(*) FILTER (WHERE i.state = 'started'))::int AS started,
                   (count(*) FILTER (WHERE i.state = 'ended'))::int AS ended,
                   (count(*) FILTER (WHERE i.state = 'left'))::int AS left_out,
                   (count(*) FILTER (WHERE i.state = 'ended' AND r.status = 'failed'))::int AS failed
            FROM pgflow.backfill_dates i LEFT JOIN pgflow.runs r ON r.id = i.run_id
            WHERE i.backfill_id = b.id) d
        ORDER BY b.id DESC;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_backfills(bigint, text, int) IS
    'The newest backfills first: this one, or those of a workflow; NULL: all. With how many of their dates are in which '
    'state, and how many of the ended runs have failed.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_backfill_dates(backfill_id bigint, only_state text)
RETURNS TABLE (logical_date timestamptz, interval_start timestamptz, interval_end timestamptz, state text, run_id uuid,
               status text, ended_as text, note text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT d.logical_date, lower(d.data_interval), upper(d.data_interval), d.state, d.run_id, r.status,
               r.ended_as::text, d.note
        FROM pgflow.backfill_dates d LEFT JOIN pgflow.runs r ON r.id = d.run_id
        WHERE d.backfill_id = list_backfill_dates.backfill_id
          AND (list_backfill_dates.only_state IS NULL OR d.state = list_backfill_dates.only_state)
        ORDER BY d.logical_date;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_backfill_dates(bigint, text) IS
    'The dates of a backfill, in their order, each with its run: those in this state; NULL: all.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_due_backfills() RETURNS SETOF bigint
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT b.id FROM pgflow.backfills b
        CROSS JOIN LATERAL (
            SELECT pgflow.count_started_dates(b.id) AS started,
                   (pgflow.find_next_date(b.id, false)).backfill_id IS NOT NULL AS has_next OFFSET 0) d
        WHERE b.finished_at IS NULL
          AND (CASE WHEN d.has_next THEN b.status = 'running' AND d.started < b.max_active ELSE d.started = 0 END
               OR EXISTS (SELECT FROM pgflow.list_ended_dates(b.id, NULL)))
        ORDER BY b.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_due_backfills() IS
    'The backfills that can go on, or whose runs have ended without a note of it. Internal.';


------------------------------------------------------------------------------------------------------------
-- Moving. No SET clauses: triggers of users on runs and step_states run inside.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.start_backfill(
    workflow_slug text, dates timestamptz[], interval_starts timestamptz[], payload jsonb, max_active int,
    on_existing text, newest_first boolean, stop_on_failure boolean, schedule text
) RETURNS bigint
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    RETURN pgflow.start_backfill(
        workflow_slug, dates, payload, max_active, on_existing, newest_first, stop_on_failure,
        CASE WHEN interval_starts IS NOT NULL THEN ARRAY(
            SELECT CASE WHEN d.began IS NOT NULL THEN pg_catalog.tstzrange(d.began, d.logical_date) END
            FROM ROWS FROM (pg_catalog.unnest(dates), pg_catalog.unnest(interval_starts))
                 WITH ORDINALITY AS d (logical_date, began, place) ORDER BY d.place) END,
        schedule);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.start_backfill(
    text, timestamptz[], timestamptz[], jsonb, int, text, boolean, boolean, text) IS
    'pgflow.start_backfill. The data interval of a date is from its interval_starts to the date.';


CREATE OR REPLACE FUNCTION pgflow_prefect.pause_backfill(backfill_id bigint, reason text) RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN (pgflow.pause_backfill(pause_backfill.backfill_id, pause_backfill.reason)).status;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.pause_backfill(bigint, text) IS
    'Starts no further date of a backfill; returns its status.';


CREATE OR REPLACE FUNCTION pgflow_prefect.resume_backfill(backfill_id bigint) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    RETURN (pgflow.resume_backfill(resume_backfill.backfill_id)).status;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.resume_backfill(bigint) IS 'Lets a paused backfill go on; returns its status.';


CREATE OR REPLACE FUNCTION pgflow_prefect.cancel_backfill(backfill_id bigint, cancel_runs boolean, reason text) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    RETURN (pgflow.cancel_backfill(cancel_backfill.backfill_id, cancel_backfill.cancel_runs, cancel_backfill.reason)).status;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.cancel_backfill(bigint, boolean, text) IS
    'Leaves the planned dates of a backfill, and cancels its runs if asked to; returns its status.';


CREATE OR REPLACE FUNCTION pgflow_prefect.advance_backfills(at_most int)
RETURNS TABLE (backfill_id bigint, decided int, problem text, is_paused boolean)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    code pg_catalog.text;
    status pg_catalog.text;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    FOR backfill_id IN SELECT due.id FROM pgflow_prefect.list_due_backfills() AS due (id) LOOP
        problem := NULL;
        is_paused := false;
        -- Here, and not below: an error there would give the lock back. Another session that then took or cancelled the
        -- backfill would keep the pause, and with it all other backfills, waiting, or make it fail.
        SELECT b.status INTO status FROM pgflow.backfills b
        WHERE b.id OPERATOR(pg_catalog.=) advance_backfills.backfill_id FOR NO KEY UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        BEGIN
            decided := pgflow.advance_backfill(backfill_id, at_most);
            IF decided OPERATOR(pg_catalog.=) 0 THEN
                problem := pgflow.find_date_holder(backfill_id);
            END IF;
            SET CONSTRAINTS ALL IMMEDIATE; -- a deferred trigger would raise at the commit, for all backfills
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            decided := 0;
            GET STACKED DIAGNOSTICS problem = MESSAGE_TEXT, code = RETURNED_SQLSTATE;
            -- Unless it is an error of the moment, each further try would meet it, too: a person has to look.
            -- A cancelled or paused one starts no run: only a note about its runs has failed.
            is_paused := status OPERATOR(pg_catalog.=) 'running'
                AND pg_catalog."left"(code, 2) OPERATOR(pg_catalog.<>) ALL ('{08,25,40,53,55,57}'::pg_catalog.text[]);
        END;
        IF is_paused THEN
            PERFORM pgflow.pause_backfill(backfill_id, pg_catalog.format('a run could not be started: %s', problem));
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.advance_backfills(int) IS
    'pgflow.advance_backfill for each backfill that can go on: how many dates of it were decided, at most so many, and what '
    'went wrong. A backfill with an error that will not pass by itself is paused.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_latest_date(workflow_slug text) RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    -- Airflow's date may be the beginning of the interval, and then that of a run here is its end.
    RETURN (SELECT greatest(r.logical_date, upper(r.data_interval)) FROM pgflow.runs r
            WHERE r.workflow_slug = find_latest_date.workflow_slug AND r.logical_date IS NOT NULL
              AND coalesce(r.payload ->> 'airflow_run_id', 'scheduled__') ~ '^(scheduled|backfill)__' -- none by hand
            ORDER BY r.logical_date DESC LIMIT 1);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_latest_date(text) IS
    'The latest date of a workflow that has a run, of a schedule or a backfill, here or in Airflow; NULL if none has.';


------------------------------------------------------------------------------------------------------------
-- Old backfills
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.prune_backfills(older_than interval, workflow_slugs text[]) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
    pruned int;
BEGIN
    DELETE FROM pgflow.backfills b
    WHERE b.finished_at < clock_timestamp() - older_than
      AND (workflow_slugs IS NULL OR b.workflow_slug = ANY (workflow_slugs))
      -- What shows when its runs were made stays as long as one of them.
      -- Looked up one by one: as a join, all dates and all runs may be read for it.
      AND NOT EXISTS (SELECT FROM pgflow.backfill_dates d
                      CROSS JOIN LATERAL (
                          SELECT FROM pgflow.runs r WHERE r.id = d.run_id AND r.backfill_id = b.id OFFSET 0) r
                      WHERE d.backfill_id = b.id);
    GET DIAGNOSTICS pruned = ROW_COUNT;
    RETURN pruned;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.prune_backfills(interval, text[]) IS
    'Deletes backfills that ended longer ago than that and have no run left, with their dates; returns how many.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_prefect');
END
$rights$;

COMMIT;

-- Backfills: runs of a workflow for dates of the past.

-- start_backfill --
-- Plan a run for each date, and start the first ones.
SELECT pgflow_prefect.start_backfill(%(workflow_slug)s, %(dates)s::timestamptz[], %(interval_starts)s::timestamptz[],
                                     %(payload)s::jsonb, %(max_active)s, %(on_existing)s, %(newest_first)s,
                                     %(stop_on_failure)s, %(schedule)s) AS id

-- preview_backfill --
-- What a backfill would do with each of these dates.
SELECT logical_date, action, run_id, status
FROM pgflow_prefect.preview_backfill(%(workflow_slug)s, %(dates)s::timestamptz[], %(on_existing)s)

-- find_latest_date --
-- The latest date that has a run.
SELECT pgflow_prefect.find_latest_date(%(workflow_slug)s) AS latest

-- list_backfills --
-- The newest backfills, of one workflow or of all; or one.
SELECT id, workflow_slug, status, note, schedule, max_active, on_existing, newest_first, stop_on_failure, created_by, created_at,
       finished_at, first, last, planned, started, ended, left_out, failed
FROM pgflow_prefect.list_backfills(%(backfill_id)s::bigint, %(workflow_slug)s::text, %(limit)s)

-- list_backfill_dates --
-- The dates of a backfill.
SELECT logical_date, interval_start, interval_end, state, run_id, status, ended_as, note
FROM pgflow_prefect.list_backfill_dates(%(backfill_id)s, %(state)s::text)

-- pause_backfill --
-- Start no further date.
SELECT pgflow_prefect.pause_backfill(%(backfill_id)s, %(reason)s) AS status

-- resume_backfill --
-- Go on.
SELECT pgflow_prefect.resume_backfill(%(backfill_id)s) AS status

-- cancel_backfill --
-- Leave the planned dates, and perhaps cancel the runs under way.
SELECT pgflow_prefect.cancel_backfill(%(backfill_id)s, %(cancel_runs)s, %(reason)s) AS status

-- advance_backfills --
-- Go on with each backfill that can.
SELECT backfill_id, decided, problem, is_paused FROM pgflow_prefect.advance_backfills(%(at_most)s)

-- prune_backfills --
-- Delete old backfills whose runs are gone.
SELECT pgflow_prefect.prune_backfills(%(older_than)s::interval, %(workflow_slugs)s::text[]) AS pruned

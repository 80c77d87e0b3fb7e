-- Who executes a run, and which workflows are enabled.

-- create_run --
-- Start a run and take it; the same id again finds the run that exists.
SELECT epoch, pgflow_prefect.note_holder(%(run_id)s, epoch, %(holder)s::jsonb)
FROM pgflow_prefect.create_run(%(workflow_slug)s, %(payload)s::jsonb, %(run_id)s, %(flow_run_id)s, %(held_by)s,
                               %(lease)s, %(max_recoveries)s, %(logical_date)s, %(interval_start)s) AS epoch

-- take_run --
-- Make a flow run the owner of a run.
SELECT epoch, pgflow_prefect.note_holder(%(run_id)s, epoch, %(holder)s::jsonb)
FROM pgflow_prefect.take_run(%(run_id)s, %(flow_run_id)s, %(held_by)s, %(lease)s, %(max_recoveries)s,
                             %(force)s) AS epoch

-- take_runs --
-- Reserve pending runs that no process holds.
SELECT run_id, workflow_slug, epoch, former_flow_run_id, was_held, backfill_id, parent_flow_run_id,
       parent_step_slug,
       pgflow_prefect.note_holder(run_id, epoch, %(holder)s::jsonb)
FROM pgflow_prefect.take_runs(%(workflow_slugs)s, %(wanted)s, %(adopt)s, %(held_by)s, %(lease)s, %(max_recoveries)s,
                              %(besides)s::uuid[], %(expired)s)

-- list_holders --
-- The processes of one machine that hold runs.
SELECT run_id, epoch, held_by, holder FROM pgflow_prefect.list_holders(%(machine)s::jsonb, %(only_run)s::uuid)

-- expire_lease --
-- End the lease of a process that is dead.
SELECT pgflow_prefect.expire_lease(%(run_id)s, %(epoch)s, %(holder)s::jsonb) AS expired

-- link_flow_run --
-- Name the flow run that a run was reserved for.
SELECT pgflow_prefect.link_flow_run(%(run_id)s, %(epoch)s, %(flow_run_id)s, %(held_by)s, %(queued)s) AS linked

-- link_flow_runs --
-- Name the flow runs that runs were reserved for, and hear what their first claims need to know.
WITH bound AS MATERIALIZED (SELECT pg_catalog.set_config('lock_timeout', %(lock_timeout)s, true) AS lock_timeout)
SELECT l.run_id, l.linked, l.status, l.remaining, l.definition_id
FROM bound, LATERAL pgflow_prefect.link_flow_runs(
    CASE WHEN bound.lock_timeout IS NOT NULL THEN %(run_ids)s::uuid[] END, %(epochs)s, %(flow_run_ids)s::uuid[],
    %(held_by)s) AS l

-- is_made_for --
-- Whether a flow run that Prefect started may take a run.
SELECT pgflow_prefect.is_made_for(%(run_id)s, %(flow_run_id)s) AS made

-- fail_run --
-- Fail a run that this process holds and can't execute; Prefect's Retry may reopen it.
SELECT pgflow_prefect.fail_run(%(run_id)s, %(epoch)s, %(held_by)s, %(reason)s) AS failed

-- release_run --
-- Hand a run back.
SELECT pgflow_prefect.release_run(%(run_id)s, %(epoch)s) AS released

-- release_reservation --
-- Hand a run back that was reserved, and linked to no flow run.
SELECT pgflow_prefect.release_reservation(%(run_id)s, %(epoch)s, %(held_by)s) AS released

-- put_off_held_run --
-- Hand back a run of which something can't be noted, to be taken again after a while.
SELECT pgflow_prefect.put_off_held_run(%(run_id)s, %(epoch)s, %(step_slug)s, %(reason)s) AS put_off

-- put_off_run --
-- Hand a reserved run back that this process could not begin, to be tried again later.
SELECT pgflow_prefect.put_off_run(%(run_id)s, %(epoch)s, %(held_by)s, %(reason)s) AS put_off

-- extend_leases --
-- Extend leases, and hear how each run is held.
SELECT run_id, epoch, holds FROM pgflow_prefect.extend_leases(%(run_ids)s, %(epochs)s, %(lease)s)

-- probe --
-- Hear from the server.
SELECT 1

-- look_at_backend --
-- What the server does in the session of another connection of ours. Where even this session's own process is not the
-- one that its client knows, a pooler stands between.
SELECT CASE
           WHEN pg_backend_pid() <> %(own)s THEN 'unknown'
           WHEN a.pid IS NULL THEN 'gone'
           WHEN a.state LIKE 'idle%%' AND a.state_change < clock_timestamp() - make_interval(secs => %(seconds)s) THEN 'idle'
           ELSE 'busy'
       END AS found
FROM (VALUES (%(pid)s::int)) AS session (pid)
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = session.pid

-- end_backend --
-- End the session of another connection of ours whose link is dead: it would keep its locks.
SELECT pg_terminate_backend(a.pid)
FROM pg_catalog.pg_stat_activity a
WHERE a.pid = %(pid)s AND pg_backend_pid() = %(own)s AND a.state LIKE 'idle in transaction%%'
  AND a.backend_start <= clock_timestamp() - make_interval(secs => %(age)s)

-- read_writability --
-- Whether anything can be written.
SELECT current_database() AS database, pg_is_in_recovery() AS in_recovery,
       current_setting('transaction_read_only')::boolean AS read_only

-- listen --
-- Hear of runs that start, end or are handed back.
LISTEN pgflow_runs

-- enable_workflow --
-- Let workers and bridges take a workflow's new runs, or not.
SELECT workflow_slug, enabled, since FROM pgflow_prefect.enable_workflow(%(workflow_slug)s, %(enabled)s)

-- list_enabled --
-- The workflows that were enabled or disabled.
SELECT workflow_slug, enabled, since FROM pgflow_prefect.list_enabled()

-- list_waiting_runs --
-- How many pending runs of each workflow no process has ever taken, and the oldest one; disabled workflows left out.
SELECT workflow_slug, runs, first FROM pgflow_prefect.list_waiting_runs()

-- list_older_runs --
-- Pending runs that services leave alone: begun before their workflow was enabled; the oldest first.
SELECT id, workflow_slug FROM pgflow_prefect.list_older_runs(%(workflow_slugs)s, %(lease)s)

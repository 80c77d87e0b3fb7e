-- Old runs that go.

-- count_prunable --
-- Runs that ended longer ago than that, by workflow and status; those that are left to a later time counted apart.
SELECT workflow_slug, status, runs, kept
FROM pgflow_prefect.count_prunable(%(older_than)s, %(grace)s, %(workflow_slugs)s, %(only_status)s)

-- prune_runs --
-- Delete a batch of them, and say how many there were.
SELECT pgflow_prefect.prune_runs(%(older_than)s::interval, %(at_most)s::int, %(workflow_slugs)s::text[],
                                 %(only_status)s::text, %(grace)s::interval) AS pruned

-- prune_run --
-- Delete one run that has ended, of any age.
SELECT pgflow_prefect.prune_run(%(run_id)s) AS pruned

-- find_gone_runs --
-- Those of these runs that were deleted.
SELECT id FROM pgflow_prefect.find_gone_runs(%(run_ids)s::uuid[]) AS id

-- prune_definitions --
-- Delete the snapshots that no run refers to.
SELECT pgflow_prefect.prune_definitions(%(workflow_slugs)s::text[], %(grace)s::interval) AS pruned

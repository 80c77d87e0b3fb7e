-- Old runs that go.

-- count_prunable --
-- Runs that ended longer ago than that, by workflow and status; those that are left to a later time counted apart.
SELECT among.slug AS workflow_slug, among.status,
       count(*) FILTER (WHERE among.goes) AS runs, count(*) FILTER (WHERE NOT among.goes) AS kept
FROM (
    SELECT w.slug, r.status,
           r.finished_at < clock_timestamp() - %(older_than)s::interval - %(grace)s::interval
               OR pgflow_prefect.is_let_go(r.id) AS goes
    FROM pgflow.workflows w
    JOIN pgflow.runs r ON r.workflow_slug = w.slug AND r.status IN ('completed', 'failed') AND r.status <> 'pending'
         AND r.finished_at < clock_timestamp() - %(older_than)s::interval
    WHERE (%(workflow_slugs)s::text[] IS NULL OR w.slug = ANY (%(workflow_slugs)s))
      AND (%(only_status)s::text IS NULL OR r.status = %(only_status)s)
) among
GROUP BY among.slug, among.status
ORDER BY among.slug, among.status

-- prune_runs --
-- Delete a batch of them, and say how many there were.
SELECT pgflow_prefect.prune_runs(%(older_than)s::interval, %(at_most)s::int, %(workflow_slugs)s::text[],
                                 %(only_status)s::text, %(grace)s::interval) AS pruned

-- prune_run --
-- Delete one run that has ended, of any age.
SELECT pgflow_prefect.prune_run(%(run_id)s) AS pruned

-- prune_definitions --
-- Delete the snapshots that no run refers to.
SELECT pgflow_prefect.prune_definitions(%(workflow_slugs)s::text[], %(grace)s::interval) AS pruned

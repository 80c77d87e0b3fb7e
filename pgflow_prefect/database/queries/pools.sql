-- Steps that processes of work pools do.

-- begin_pool_step --
-- Of a process of a work pool: claim an attempt, and read its input.
SELECT workflow_slug, payload::text, upstream_results::text, logical_date, interval_start, interval_end
FROM pgflow_prefect.begin_pool_step(%(run_id)s, %(step_slug)s, %(task_index)s, %(attempt)s, %(holder)s, %(lease)s)

-- extend_pool_step --
-- Of a process of a work pool: whether it may go on.
SELECT pgflow_prefect.extend_pool_step(%(run_id)s, %(step_slug)s, %(task_index)s, %(attempt)s, %(holder)s, %(lease)s)
       AS extended

-- end_pool_step --
-- End the lease of an attempt, and note why it has failed.
SELECT pgflow_prefect.end_pool_step(%(run_id)s, %(step_slug)s, %(task_index)s, %(attempt)s, %(holder)s, %(failure)s,
                                    %(is_final)s) AS ended

-- read_pool_steps --
-- Of the owner of runs: what processes of work pools do.
SELECT place, is_awaited, has_begun, is_live, failure, is_final
FROM pgflow_prefect.read_pool_steps(%(run_ids)s, %(step_slugs)s, %(task_indexes)s, %(attempts)s) ORDER BY place

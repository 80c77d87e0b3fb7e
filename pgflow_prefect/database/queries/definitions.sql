-- Workflows, their steps and deps.

-- list_workflows --
-- Every workflow with its size, its runs, and whether they are taken.
SELECT slug, steps, deps, pending, completed, failed, enabled, bound FROM pgflow_prefect.list_workflows()

-- list_slugs --
-- The slugs of all workflows.
SELECT slug FROM pgflow_prefect.list_slugs() AS slug

-- load_definition --
-- A workflow as it is defined now, in one statement: an edit in between can't mix two versions.
SELECT slug, steps, deps, rules, when_failed, failed_by
FROM pgflow_prefect.load_definitions(ARRAY[%(workflow_slug)s::text])

-- limit_waiting --
-- Until the transaction's end, wait no longer than this for a lock.
SELECT set_config('lock_timeout', '10s', true)

-- insert_workflow --
-- A new workflow; no row where it is there already.
SELECT pgflow_prefect.insert_workflow(%(workflow_slug)s) AS is_new

-- lock_workflow --
-- Let no other session edit a workflow, nor start a run of it. As strong as the deletion of a step needs it, and from the
-- start: a weaker lock, made stronger later, would deadlock with a session that inserts a step meanwhile.
SELECT pgflow_prefect.lock_workflow(%(workflow_slug)s)

-- insert_steps --
-- Steps of a workflow.
SELECT pgflow_prefect.insert_steps(%(workflow_slug)s, %(steps)s)

-- insert_deps --
-- Deps of a workflow, in one statement: after each, the engine looks for cycles.
SELECT pgflow_prefect.insert_deps(%(workflow_slug)s, %(upstream)s, %(downstream)s)

-- set_rules --
-- What is said of a workflow and its steps beside their names.
SELECT pgflow_prefect.set_rules(%(workflow_slug)s, %(rules)s::jsonb, %(when_failed)s, %(failed_by)s)

-- delete_steps --
-- Steps of a workflow, as far as no run needs them.
SELECT pgflow_prefect.delete_steps(%(workflow_slug)s, %(steps)s)

-- delete_deps --
-- Deps of a workflow.
SELECT pgflow_prefect.delete_deps(%(workflow_slug)s, %(upstream)s, %(downstream)s)

-- load_run_definition --
-- The definition that a run began with; the current one of a run that nothing was done to yet.
SELECT slug, steps, deps, rules, uses_rules, continues FROM pgflow_prefect.load_run_definition(%(run_id)s)

-- list_task_options --
-- How the released pgflow tries the tasks of a flow.
SELECT step_slug, max_attempts, base_delay, timeout, start_delay FROM pgflow_prefect.list_task_options(%(workflow_slug)s)

-- find_pending_user --
-- A pending run that has executed one of these steps: only when it has ended, its rows can go.
SELECT id FROM pgflow_prefect.find_pending_user(%(workflow_slug)s, %(steps)s) AS id

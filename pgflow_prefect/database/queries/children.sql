-- take_children --
-- Reserve pending children of these runs that no process holds.
SELECT run_id, workflow_slug, epoch, former_flow_run_id, parent_flow_run_id, parent_step_slug,
       pgflow_prefect.note_holder(run_id, epoch, %(holder)s::jsonb)
FROM pgflow_prefect.take_children(%(parents)s::uuid[], %(workflow_slugs)s, %(wanted)s, %(held_by)s, %(lease)s,
                                  %(max_recoveries)s, %(besides)s::uuid[])

-- move_children --
-- Cancel a child that its parent has left, or reopen one that it waits for again.
SELECT pgflow_prefect.move_children(1) AS moved

-- list_relatives --
-- The parent of a run, and its children.
SELECT is_parent, run_id, workflow_slug, status, ended_as, step_slug, item_index, attempt
FROM pgflow_prefect.list_relatives(%(run_id)s, %(at_most)s)

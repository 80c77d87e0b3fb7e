-- The items of a map: their claims and their reports, in batches.

-- work_items --
-- Report on items of a map, and claim others: a row for each claimed item, and at last one of the map itself.
SELECT status, ended_as, error_message, skip_reason, skip_message, run_status, total, remaining, failed, next_due,
       item_index, attempt, item::text
FROM pgflow_prefect.work_items(%(run_id)s, %(step_slug)s, %(epoch)s, %(reports)s::jsonb, %(wanted)s, %(held)s)

-- complete_pending_items --
-- Store the results of items in their handler's transaction, if they are still pending; else nothing is committed.
SELECT status, ended_as, error_message, accepted, skip_reason, skip_message
FROM pgflow_prefect.complete_pending_items(%(run_id)s, %(step_slug)s, %(item_indexes)s, %(result)s::jsonb, %(epoch)s,
                                           %(attempts)s, %(outcome)s::jsonb)

-- defer_items --
-- Note in their handler's transaction that another program reports these items.
SELECT pgflow_prefect.work_items(%(run_id)s, %(step_slug)s, %(epoch)s, %(reports)s::jsonb, 0, NULL)

-- list_returned_items --
-- Which of these items were given back, to be executed again.
SELECT item_index FROM pgflow_prefect.list_returned_items(%(run_id)s, %(step_slug)s, %(item_indexes)s)

-- list_failed_items --
-- The first failed items of a map.
SELECT item_index, attempts, error_message
FROM pgflow_prefect.list_failed_items(%(run_id)s, %(step_slug)s, %(limit)s)

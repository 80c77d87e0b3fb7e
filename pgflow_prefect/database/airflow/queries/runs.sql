-- Runs of Airflow. Columns that not every version has are read by their names, from the row as JSON.

-- write_bytes_as_hex --
-- How columns of Airflow 2 that are bytes become text, in this transaction.
SELECT set_config('bytea_output', 'hex', true)

-- read_newest_run --
-- The greatest id of a run, of any DAG; 0 if there is none.
SELECT coalesce(max(id), 0) AS id FROM dag_run

-- list_new_runs --
-- The runs behind an id, of any DAG: by the primary key, so that a look costs as much as it finds.
SELECT id, dag_id FROM dag_run WHERE id > %(after)s ORDER BY id LIMIT %(limit)s

-- list_active_runs --
-- The runs of these DAGs that have not ended. Both states have an index of their own.
(SELECT id FROM dag_run WHERE state = 'running' AND dag_id = ANY (%(dag_ids)s) LIMIT %(limit)s)
UNION ALL
(SELECT id FROM dag_run WHERE state = 'queued' AND dag_id = ANY (%(dag_ids)s) LIMIT %(limit)s)

-- read_runs --
-- These runs, without their `conf`: that of many runs may be too much.
SELECT r.id, r.dag_id, r.run_id, r.state, r.queued_at, r.start_date, r.end_date, r.data_interval_start,
       r.data_interval_end, r.clear_number, r.updated_at, j.row ->> 'logical_date' AS logical_date,
       j.row ->> 'execution_date' AS execution_date
FROM dag_run r CROSS JOIN LATERAL (SELECT to_jsonb(r) - 'conf' OFFSET 0) AS j (row)
WHERE r.id = ANY (%(ids)s)
ORDER BY r.id

-- read_confs --
-- The `conf` of these runs: without the text of one that is too long, and as many as are not too long together. A pickled
-- one has no type `jsonb`.
SELECT f.id, f.conf_is_json, f.conf_size, f.total - coalesce(f.conf_size, 0) < %(most_together)s AS fits,
       CASE WHEN f.conf_is_json AND f.conf_size <= %(most_bytes)s
                 AND f.total - f.conf_size < %(most_together)s THEN f.conf::text END AS conf
FROM (
    SELECT r.id, r.conf, pg_typeof(r.conf) = 'jsonb'::regtype AS conf_is_json, s.size AS conf_size,
           sum(coalesce(least(s.size, %(most_bytes)s), 0)) OVER (ORDER BY w.place) AS total
    FROM unnest(%(ids)s::bigint[]) WITH ORDINALITY AS w (id, place)
    JOIN dag_run r ON r.id = w.id
    CROSS JOIN LATERAL (SELECT octet_length(r.conf::text) OFFSET 0) AS s (size)
) AS f

-- find_runs --
-- The ids of these runs.
SELECT r.id, w.dag_id, w.run_id
FROM unnest(%(dag_ids)s::text[], %(run_ids)s::text[]) AS w (dag_id, run_id)
CROSS JOIN LATERAL (SELECT r.id FROM dag_run r WHERE r.dag_id = w.dag_id AND r.run_id = w.run_id LIMIT 1) AS r

-- read_instances --
-- The task instances of these runs, at most so many and one more of each.
SELECT r.id, t.task_id, t.map_index, t.state, t.try_number, t.max_tries, t.start_date, t.end_date, t.queued_dttm,
       t.operator
FROM unnest(%(ids)s::bigint[], %(dag_ids)s::text[], %(run_ids)s::text[]) AS r (id, dag_id, run_id)
CROSS JOIN LATERAL (
    SELECT * FROM task_instance t WHERE t.dag_id = r.dag_id AND t.run_id = r.run_id LIMIT %(limit)s + 1
) AS t
ORDER BY r.id, t.task_id, t.map_index

-- read_results --
-- The return values of these task instances: without those that are too long, and as many as are not too long together.
SELECT f.id, f.task_id, f.map_index, f.is_json, f.size, f.total - f.size < %(most_together)s AS fits,
       CASE WHEN f.size <= %(most_bytes)s AND f.total - f.size < %(most_together)s THEN f.value::text END AS value
FROM (
    SELECT r.*, pg_typeof(x.value) = 'jsonb'::regtype AS is_json, x.value, s.size,
           sum(least(s.size, %(most_bytes)s)) OVER (ORDER BY r.place) AS total
    FROM unnest(%(ids)s::bigint[], %(task_ids)s::text[], %(map_indexes)s::int[]) WITH ORDINALITY
         AS r (id, task_id, map_index, place)
    CROSS JOIN LATERAL (
        SELECT x.value FROM xcom x
        WHERE x.dag_run_id = r.id AND x.task_id = r.task_id AND x.map_index = r.map_index AND x.key = 'return_value'
    ) AS x
    CROSS JOIN LATERAL (SELECT octet_length(x.value::text) OFFSET 0) AS s (size)
) AS f

-- list_ended_runs --
-- Runs of a DAG that have ended since then, the newest first, behind an id.
SELECT id FROM dag_run
WHERE dag_id = %(dag_id)s AND state IN ('success', 'failed') AND end_date >= %(since)s AND id < %(before)s
ORDER BY id DESC LIMIT %(limit)s

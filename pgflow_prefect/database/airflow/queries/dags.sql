-- The serialized DAGs of Airflow's database. Its tables have no schema here: the role's search_path finds them.

-- list_dags --
-- The ids of all DAGs that Airflow has serialized.
SELECT DISTINCT dag_id FROM serialized_dag ORDER BY dag_id

-- load_dags --
-- The newest document of each of these DAGs; of one that is too big, its size only.
SELECT dag_id, size,
       CASE WHEN size <= %(most_bytes)s THEN data END AS data,
       CASE WHEN size <= %(most_bytes)s THEN data_compressed END AS data_compressed
FROM (SELECT DISTINCT ON (dag_id) dag_id, nullif(data::text, 'null') AS data, data_compressed,
             coalesce(octet_length(nullif(data::text, 'null')), octet_length(data_compressed), 0) AS size
      FROM serialized_dag
      WHERE dag_id = ANY (%(dag_ids)s)
      ORDER BY dag_id, last_updated DESC) AS newest

-- What `init` reads before the scripts lock a table: version 2 told a cancelled run by its message alone.

-- find_unnoted_endings --
-- Whether there are runs of a version that noted no endings.
SELECT count(*) FILTER (WHERE a.attname = 'error_message') > count(*) FILTER (WHERE a.attname = 'ended_as') AS found
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = to_regclass('pgflow.runs')

-- look_for_cancelled --
-- Every run that may have been cancelled; the script looks at these again, and at those that have ended since. The row
-- without a run says when this look was.
CREATE UNLOGGED TABLE pgflow.ended_before AS
SELECT r.id AS run_id, statement_timestamp() AS looked_at
FROM pgflow.runs r WHERE r.status = 'failed' AND r.error_message NOT LIKE 'step "%%" failed: %%'
UNION ALL SELECT NULL, statement_timestamp()

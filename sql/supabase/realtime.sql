-- Runs and step states on Supabase Realtime: a browser that subscribes gets every change that it may see.
--
-- Adds pgflow.runs and pgflow.step_states to the publication supabase_realtime. It does nothing if there is no such
-- publication, or if the tables are in it already. Realtime shows a subscriber the rows that row_level_security.sql shows
-- to this user, so run that script first. Without it, a role that may SELECT a table gets all changes of its rows.
--
-- The replica identity stays the primary key. That is enough: every INSERT and UPDATE sends the whole new row, and the
-- key of the old row. With FULL, every claim and report would write payloads and results into the log a second time.
-- Policies do not filter a DELETE: subscribers get the ids of deleted runs, and nothing else.
--
-- Paste this file into an SQL editor as the owner of the schema pgflow, or psql -f realtime.sql. Safe to run again.
-- To undo it: ALTER PUBLICATION supabase_realtime DROP TABLE pgflow.runs, pgflow.step_states;

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;

DO $publish$
DECLARE
    publication pg_catalog.pg_publication;
    published regclass;
BEGIN
    IF to_regclass('pgflow.definitions') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow is missing or old' USING HINT = 'Run pgflow.sql first.';
    END IF;
    SELECT * INTO publication FROM pg_catalog.pg_publication WHERE pubname = 'supabase_realtime';
    IF NOT FOUND THEN
        RAISE NOTICE 'there is no publication supabase_realtime: nothing to do';
        RETURN;
    ELSIF publication.puballtables THEN
        RAISE NOTICE 'the publication supabase_realtime has all tables: nothing to do';
        RETURN;
    END IF;
    FOREACH published IN ARRAY ARRAY['pgflow.runs', 'pgflow.step_states']::regclass[] LOOP
        -- The view also knows of schemas that are published as a whole. By name: a cast to regclass would want USAGE on
        -- the schema of whatever else is published.
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_publication_tables t
                              JOIN pg_catalog.pg_namespace n ON n.nspname = t.schemaname
                              JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename
                              WHERE t.pubname = publication.pubname AND c.oid = published);
        BEGIN
            EXECUTE format('ALTER PUBLICATION %I ADD TABLE %s', publication.pubname, published);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE EXCEPTION '% can''t add % to the publication supabase_realtime: %', current_user, published, SQLERRM
                USING ERRCODE = 'insufficient_privilege',
                      HINT = 'It takes the owner of both, on Supabase that is postgres.';
        END;
    END LOOP;
END
$publish$;

COMMIT;

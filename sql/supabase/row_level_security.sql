-- Row-level security: a user of the application sees only its own runs.
--
--   authenticated   reads all definitions. Starts runs. Reads and cancels its own runs, and reads their step states.
--                   Can't reopen runs, and can't read snapshots or anything in pgflow_prefect
--   service_role and the roles of roles.sql: every row, within their grants
--   anon, and all other roles: nothing
--
-- You choose who owns a run. By default, the column owner_id says so. A run gets auth.uid() there when it starts. Older
-- runs have no owner until you fill the column. You can also name an expression over the columns of pgflow.runs. It is
-- evaluated with the user's rights, so write the schema of everything that it names:
--
--     SELECT pgflow_api.protect_runs($$ payload ->> 'team' = (SELECT auth.jwt() ->> 'team') $$);
--     SELECT pgflow_api.protect_runs();   -- the column again
--
-- Your choice stays when this script runs again.
--
-- Workers. The engine's functions are set to row_security = off. If a policy applies to the caller, they raise an error,
-- even if the policy hides nothing: half of the rows is worse than none. So a worker must be the tables' owner or have
-- BYPASSRLS. This script gives BYPASSRLS to pgflow_define, pgflow_work and pgflow_observe if it may. A superuser may.
-- From PostgreSQL 16 on, so may a role with CREATEROLE and BYPASSRLS, such as Supabase's postgres. Members of a role do
-- not inherit BYPASSRLS. So a login must become the role, which also works behind a pooler:
--
--     GRANT pgflow_work TO my_worker;  ALTER ROLE my_worker SET role = 'pgflow_work';
--
-- If no role can get BYPASSRLS, let workers connect as the tables' owner. The result of this script tells which roles are
-- ready, and how to make the others ready.
--
-- Needs pgflow.sql, api.sql and the role authenticated; run it again after roles.sql, or after tables were added.
-- Paste it into an SQL editor as the owner of the schema pgflow, or psql -f. One transaction, safe to run again.
-- To undo it, revoke the grants first:
--     REVOKE ALL ON ALL TABLES IN SCHEMA pgflow, pgflow_api FROM authenticated;
--     and for each table of pgflow, pgflow_prefect and pgflow_api: ALTER TABLE ... DISABLE ROW LEVEL SECURITY;

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regclass('pgflow_api.requests') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_api is missing' USING HINT = 'Run pgflow.sql and supabase/api.sql first.';
    END IF;
    IF to_regrole('authenticated') IS NULL THEN
        RAISE EXCEPTION 'there is no role authenticated'
            USING ERRCODE = 'undefined_object', HINT = 'On Supabase there is; elsewhere: CREATE ROLE authenticated;';
    END IF;
    IF NOT pg_has_role((SELECT relowner FROM pg_catalog.pg_class WHERE oid = 'pgflow.runs'::regclass), 'USAGE') THEN
        RAISE EXCEPTION '% does not own the tables of pgflow', current_user
            USING ERRCODE = 'insufficient_privilege', HINT = 'Run this as the role that ran pgflow.sql.';
    END IF;
    IF to_regprocedure('pgflow.lock_schema(text)') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow is old' USING HINT = 'Run pgflow.sql first.';
    END IF;
    PERFORM pgflow.lock_schema('pgflow');
END
$guard$;


------------------------------------------------------------------------------------------------------------
-- Whose a run is
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_api.inherit_owner() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.owner_id := (SELECT r.owner_id FROM pgflow.runs r WHERE r.id = NEW.parent_run_id);
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow_api.inherit_owner() IS
    'A run that is a step of another run belongs to the owner of that run, and not to the worker that begins it.';

REVOKE EXECUTE ON FUNCTION pgflow_api.inherit_owner() FROM PUBLIC;


CREATE OR REPLACE FUNCTION pgflow_api.protect_runs(using_expression text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    chosen text := using_expression;
    probe refcursor;
BEGIN
    IF chosen IS NULL THEN
        IF to_regprocedure('auth.uid()') IS NULL THEN
            RAISE EXCEPTION 'there is no function auth.uid() to tell who a user is'
                USING ERRCODE = 'undefined_function',
                      HINT = 'Give an expression over the columns of pgflow.runs: pgflow_api.protect_runs(''...'')';
        END IF;
        IF NOT EXISTS (SELECT FROM pg_attribute
                       WHERE attrelid = 'pgflow.runs'::regclass AND attname = 'owner_id' AND NOT attisdropped) THEN
            ALTER TABLE pgflow.runs ADD COLUMN owner_id UUID; -- its default comes after: old rows were not his
            ALTER TABLE pgflow.runs ALTER COLUMN owner_id SET DEFAULT auth.uid();
            COMMENT ON COLUMN pgflow.runs.owner_id IS 'The user whose run it is; NULL: no user''s.';
        END IF;
        IF NOT EXISTS (SELECT FROM pg_trigger
                       WHERE tgrelid = 'pgflow.runs'::regclass AND tgname = 'inherit_owner') THEN
            CREATE TRIGGER inherit_owner BEFORE INSERT ON pgflow.runs FOR EACH ROW
                WHEN (NEW.parent_run_id IS NOT NULL) EXECUTE FUNCTION pgflow_api.inherit_owner();
        END IF;
        IF to_regclass('pgflow.runs_owner') IS NULL THEN
            CREATE INDEX runs_owner ON pgflow.runs (owner_id, created_at);
        END IF;
        IF to_regrole('service_role') IS NOT NULL THEN
            GRANT INSERT (owner_id), UPDATE (owner_id) ON pgflow.runs TO service_role; -- starts runs for a user
        END IF;
        -- In a subquery it is evaluated once a statement, not once a row.
        chosen := 'owner_id = (SELECT auth.uid())';
    END IF;

    -- A policy is made of text. A cursor is one statement, and a CASE closes its bracket: what passes here is an
    -- expression, and a stray semicolon or bracket is an error instead of something else that is executed.
    BEGIN
        OPEN probe FOR EXECUTE format(E'SELECT CASE WHEN (%s\n) THEN true END FROM pgflow.runs', chosen);
        CLOSE probe;
    EXCEPTION WHEN OTHERS THEN
        RAISE EXCEPTION 'this is no condition on a row of pgflow.runs: %', chosen
            USING ERRCODE = 'invalid_parameter_value', DETAIL = SQLERRM;
    END;

    IF EXISTS (SELECT FROM pg_policy WHERE polrelid = 'pgflow.runs'::regclass AND polname = 'own_runs') THEN
        EXECUTE format(E'ALTER POLICY own_runs ON pgflow.runs USING (%s\n)', chosen);
        EXECUTE format(E'ALTER POLICY start_own_runs ON pgflow.runs WITH CHECK (%s\n)', chosen);
    ELSE
        EXECUTE format(E'CREATE POLICY own_runs ON pgflow.runs FOR SELECT TO authenticated USING (%s\n)', chosen);
        EXECUTE format(E'CREATE POLICY start_own_runs ON pgflow.runs FOR INSERT TO authenticated WITH CHECK (%s\n)',
                       chosen);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_api.protect_runs(text) IS
    'Chooses the owner of a run: the user in owner_id, or an expression over the columns of pgflow.runs.';

REVOKE EXECUTE ON FUNCTION pgflow_api.protect_runs(text) FROM PUBLIC;

DO $choose$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_policy
                   WHERE polrelid = 'pgflow.runs'::regclass AND polname = 'own_runs') THEN
        PERFORM pgflow_api.protect_runs();  -- <- your choice, where you have made it: ('an expression')
    ELSIF EXISTS (SELECT FROM pg_catalog.pg_attribute
                  WHERE attrelid = 'pgflow.runs'::regclass AND attname = 'owner_id' AND NOT attisdropped)
          AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger
                          WHERE tgrelid = 'pgflow.runs'::regclass AND tgname = 'inherit_owner') THEN
        CREATE TRIGGER inherit_owner BEFORE INSERT ON pgflow.runs FOR EACH ROW -- what an earlier version lacked
            WHEN (NEW.parent_run_id IS NOT NULL) EXECUTE FUNCTION pgflow_api.inherit_owner();
    END IF;
END
$choose$;


------------------------------------------------------------------------------------------------------------
-- Who sees which rows. The looks at the catalog: ALTER would lock a table even where there is nothing to do.
------------------------------------------------------------------------------------------------------------

DO $protect$
DECLARE
    protected record;
    by_grant oid[];
    names text;
BEGIN
    SELECT array_agg(oid ORDER BY oid), string_agg(quote_ident(rolname), ', ' ORDER BY oid) INTO by_grant, names
    FROM pg_catalog.pg_roles
    WHERE rolname IN ('pgflow_define', 'pgflow_run', 'pgflow_work', 'pgflow_observe', 'service_role');

    FOR protected IN
        SELECT c.oid::regclass AS name, c.relrowsecurity,
               p.oid AS policy, (SELECT array_agg(role ORDER BY role) FROM unnest(p.polroles) AS role) AS roles
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_catalog.pg_policy p ON p.polrelid = c.oid AND p.polname = 'as_granted'
        WHERE n.nspname IN ('pgflow', 'pgflow_prefect', 'pgflow_api') AND c.relkind IN ('r', 'p')
        ORDER BY n.nspname, c.relname
    LOOP
        IF NOT protected.relrowsecurity THEN
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', protected.name);
        END IF;
        IF by_grant IS NULL THEN
            CONTINUE;
        ELSIF protected.policy IS NULL THEN
            EXECUTE format('CREATE POLICY as_granted ON %s TO %s USING (true) WITH CHECK (true)',
                           protected.name, names);
        ELSIF protected.roles <> by_grant THEN
            EXECUTE format('ALTER POLICY as_granted ON %s TO %s', protected.name, names);
        END IF;
    END LOOP;
END
$protect$;

DO $policies$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN SELECT * FROM (VALUES
        ('pgflow.workflows', 'read_definitions', 'FOR SELECT TO authenticated USING (true)'),
        ('pgflow.steps', 'read_definitions', 'FOR SELECT TO authenticated USING (true)'),
        ('pgflow.deps', 'read_definitions', 'FOR SELECT TO authenticated USING (true)'),
        -- Through the policy of pgflow.runs: a user who sees the run sees its steps.
        ('pgflow.step_states', 'of_own_runs',
         'FOR SELECT TO authenticated USING (EXISTS (SELECT FROM pgflow.runs r WHERE r.id = run_id))'),
        ('pgflow.step_maps', 'of_own_runs',
         'FOR SELECT TO authenticated USING (EXISTS (SELECT FROM pgflow.runs r WHERE r.id = run_id))'),
        ('pgflow.step_items', 'of_own_runs',
         'FOR SELECT TO authenticated USING (EXISTS (SELECT FROM pgflow.runs r WHERE r.id = run_id))'),
        ('pgflow_api.requests', 'cancel_own_runs',
         'FOR INSERT TO authenticated WITH CHECK (action = ''cancel'' '
         'AND EXISTS (SELECT FROM pgflow.runs r WHERE r.id = run_id))')
    ) AS policy (relation, name, rule) LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_policy
                              WHERE polrelid = wanted.relation::regclass AND polname = wanted.name);
        EXECUTE format('CREATE POLICY %I ON %s %s', wanted.name, wanted.relation, wanted.rule);
    END LOOP;
END
$policies$;

-- By column: a user can't say whose a run is, in which state it is, or when it was begun.
GRANT USAGE ON SCHEMA pgflow, pgflow_api TO authenticated;
GRANT SELECT ON pgflow.workflows, pgflow.steps, pgflow.deps, pgflow.runs, pgflow.step_states, pgflow.step_maps,
    pgflow.step_items TO authenticated;
GRANT INSERT (workflow_slug, id, payload) ON pgflow.runs TO authenticated;
GRANT INSERT (run_id, action, reason) ON pgflow_api.requests TO authenticated;
GRANT EXECUTE ON FUNCTION pgflow_api.run_workflow, pgflow_api.request, pgflow_api.cancel_run TO authenticated;


------------------------------------------------------------------------------------------------------------
-- Workers: their roles bypass the policies
------------------------------------------------------------------------------------------------------------

DO $bypass$
DECLARE
    bypassing text;
BEGIN
    FOR bypassing IN
        SELECT rolname FROM pg_catalog.pg_roles
        WHERE rolname IN ('pgflow_define', 'pgflow_work', 'pgflow_observe') AND NOT rolbypassrls
    LOOP
        EXECUTE format('ALTER ROLE %I BYPASSRLS', bypassing);
    END LOOP;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING '% may not give BYPASSRLS: the engine''s functions will raise errors for the roles of roles.sql',
                  current_user
        USING HINT = 'Let a superuser say ALTER ROLE pgflow_work BYPASSRLS, or workers connect as the tables'' owner.';
END
$bypass$;

COMMIT;

-- The roles that may call the engine's functions now. An SQL editor shows this table, but no warnings.
SELECT r.rolname AS role,
       CASE WHEN r.rolsuper OR r.rolbypassrls THEN 'ready'
            WHEN NOT r.rolcanlogin
            THEN format('the engine raises errors until a superuser says: ALTER ROLE %I BYPASSRLS', r.rolname)
            WHEN EXISTS (SELECT FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) AS setting
                         WHERE s.setrole = r.oid AND s.setdatabase IN (0, d.oid) AND setting = 'role=' || kit.rolname)
            THEN format('becomes %s', kit.rolname)
            ELSE format('the engine raises errors until: ALTER ROLE %I SET role = %L', r.rolname, kit.rolname)
       END AS "the engine's functions"
FROM pg_catalog.pg_roles kit
JOIN pg_catalog.pg_roles r ON r.oid = kit.oid
     OR (r.rolcanlogin AND NOT r.rolsuper AND pg_catalog.pg_has_role(r.oid, kit.oid, 'MEMBER')
         AND NOT pg_catalog.pg_has_role(r.oid, (SELECT relowner FROM pg_catalog.pg_class
                                                WHERE oid = 'pgflow.runs'::regclass), 'USAGE'))
JOIN pg_catalog.pg_database d ON d.datname = current_database()
WHERE kit.rolname IN ('pgflow_define', 'pgflow_work', 'pgflow_observe')
ORDER BY r.rolname, kit.rolname;

-- pgflow_prefect: the payloads of schedules. Prefect has a schedule's times, and the id of its row here.
--
-- A part of the contract of ../CONTRACT.md for the classic schema. Needs pgflow.sql, classic/pgflow_prefect.sql and
-- classic/definitions.sql, whose head says how these functions are planned.
-- psql -d DATABASE -f schedules.sql; one transaction, safe to run again.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.owners') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect is missing'
            USING HINT = 'Run pgflow.sql and classic/pgflow_prefect.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0';
    PERFORM pgflow.lock_schema('pgflow_prefect');
    IF (SELECT max(substring(p.prosrc FROM '[0-9]+')::int) FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = 'pgflow_prefect'::regnamespace AND p.proname = 'adapter_version') > 10 THEN
        RAISE EXCEPTION 'the schema pgflow_prefect has a later version than 10, and this script is of version 10'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Upgrade the program: pip install --upgrade pgflow-prefect';
    END IF;
END
$guard$;

-- The payload with which a schedule of Prefect starts runs. Who may write here decides with what scheduled runs begin.
CREATE TABLE IF NOT EXISTS pgflow_prefect.schedules (
    id UUID PRIMARY KEY,           -- the only thing that Prefect has of this row
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug) ON UPDATE CASCADE ON DELETE CASCADE,
    name TEXT NOT NULL,
    payload JSONB NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (workflow_slug, name)
);


CREATE OR REPLACE FUNCTION pgflow_prefect.write_schedule(id uuid, workflow_slug text, name text, payload jsonb)
RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    written uuid;
BEGIN
    PERFORM FROM pgflow.workflows w WHERE w.slug = write_schedule.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO pgflow_prefect.schedules AS s (id, workflow_slug, name, payload)
    VALUES (write_schedule.id, write_schedule.workflow_slug, write_schedule.name,
            pgflow.check_json(write_schedule.payload, true, format('the payload of schedule "%s"', write_schedule.name)))
    ON CONFLICT (workflow_slug, name) DO UPDATE SET payload = excluded.payload, updated_at = excluded.updated_at
    RETURNING s.id INTO written;
    RETURN written;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.write_schedule(uuid, text, text, jsonb) IS
    'Stores the payload of a schedule, and returns the id of its row: of a schedule that has a row, the former id.';


CREATE OR REPLACE FUNCTION pgflow_prefect.delete_schedules(ids uuid[]) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN QUERY DELETE FROM pgflow_prefect.schedules s WHERE s.id = ANY (ids) RETURNING s.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.delete_schedules(uuid[]) IS
    'Deletes the payloads of schedules, and returns the ids of the rows that there were.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_schedules(workflow_slugs text[])
RETURNS TABLE (id uuid, workflow_slug text, name text, payload jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.id, s.workflow_slug, s.name,
               CASE WHEN pgflow.find_json_problem(s.payload, true) IS NULL THEN s.payload END
        FROM pgflow_prefect.schedules s
        WHERE list_schedules.workflow_slugs IS NULL OR s.workflow_slug = ANY (list_schedules.workflow_slugs)
        ORDER BY s.workflow_slug, s.name;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_schedules(text[]) IS
    'The payloads of the schedules of these workflows, or of all. A payload beyond the limits of pgflow.limits is NULL.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_schedule(id uuid)
RETURNS TABLE (workflow_slug text, name text, payload jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.workflow_slug, s.name,
               pgflow.check_json(s.payload, true, format('the payload of schedule "%s"', s.name))
        FROM pgflow_prefect.schedules s WHERE s.id = read_schedule.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_schedule(uuid) IS
    'The workflow, the name and the payload of a schedule. No row: there is none of this id.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_prefect');
END
$rights$;

COMMIT;

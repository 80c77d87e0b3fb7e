-- The payloads of schedules, of which Prefect has the ids only.

-- write_schedule --
-- Store the payload of a schedule; the id of a schedule that has a row stays.
SELECT pgflow_prefect.write_schedule(%(id)s, %(workflow_slug)s, %(name)s, %(payload)s::jsonb) AS id

-- delete_schedules --
-- Delete the payloads of schedules.
SELECT pgflow_prefect.delete_schedules(%(ids)s) AS id

-- list_schedules --
-- The payloads of the schedules of some workflows; no slugs: of all.
SELECT id, workflow_slug, name, payload::text FROM pgflow_prefect.list_schedules(%(workflow_slugs)s)

-- read_schedule --
-- The payload with which a schedule starts a run.
SELECT workflow_slug, name, payload::text FROM pgflow_prefect.read_schedule(%(id)s)

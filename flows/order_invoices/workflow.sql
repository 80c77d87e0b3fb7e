-- The workflow of flows/order_invoices.py: a map over the orders of the payload.

INSERT INTO pgflow.workflows (slug) VALUES ('order_invoices');

INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
    ('order_invoices', 'tax_rates'),
    ('order_invoices', 'summary');

-- executed once for each element of payload.orders; a failed order does not keep the others from their invoices
INSERT INTO pgflow.steps (workflow_slug, slug, step_type, map_over, map_path, when_item_fails) VALUES
    ('order_invoices', 'invoice', 'map', 'payload', '{orders}', 'continue');

-- all items of the map share the tax rates, and summary waits for the last item
INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
    ('order_invoices', 'tax_rates', 'invoice'),
    ('order_invoices', 'invoice', 'summary');

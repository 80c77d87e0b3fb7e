-- The workflow of flows/price_update.py, and the tables that it works on.

CREATE SCHEMA IF NOT EXISTS shop;

CREATE TABLE IF NOT EXISTS shop.products (
    sku TEXT PRIMARY KEY,
    category TEXT NOT NULL,
    cost NUMERIC(10, 2) NOT NULL,
    price NUMERIC(10, 2),
    priced_times INT NOT NULL DEFAULT 0  -- one a run, whatever dies in between
);

-- The supplier's list, with as many products as the payload asks for: the same ones for the same number.
CREATE OR REPLACE FUNCTION shop.load_costs(input jsonb) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    wanted int := coalesce((input #>> '{payload,products}')::int, 4000);
    categories text[] := ARRAY['books', 'garden', 'tools', 'toys'];
BEGIN
    INSERT INTO shop.products AS p (sku, category, cost)
    SELECT 'sku-' || lpad(n::text, 6, '0'), categories[1 + n % 4], 1 + (n * 7919 % 10000) / 100.0
    FROM generate_series(1, wanted) n
    ON CONFLICT (sku) DO UPDATE SET cost = excluded.cost;
    RETURN (SELECT jsonb_object_agg(category, products)
            FROM (SELECT category, count(*) AS products FROM shop.products GROUP BY category) c);
END
$$;

INSERT INTO pgflow.workflows (slug) VALUES ('price_update') ON CONFLICT DO NOTHING;

INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
    ('price_update', 'load_costs'),
    ('price_update', 'price_books'),
    ('price_update', 'price_garden'),
    ('price_update', 'price_tools'),
    ('price_update', 'price_toys'),
    ('price_update', 'check_margins'),
    ('price_update', 'print_labels'),
    ('price_update', 'tell_shops'),
    ('price_update', 'update_search'),
    ('price_update', 'sign_off'),
    ('price_update', 'report')
ON CONFLICT DO NOTHING;

INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
    ('price_update', 'load_costs', 'price_books'),
    ('price_update', 'load_costs', 'price_garden'),
    ('price_update', 'load_costs', 'price_tools'),
    ('price_update', 'load_costs', 'price_toys'),
    ('price_update', 'price_books', 'check_margins'),
    ('price_update', 'price_garden', 'check_margins'),
    ('price_update', 'price_tools', 'check_margins'),
    ('price_update', 'price_toys', 'check_margins'),
    ('price_update', 'check_margins', 'sign_off'),
    ('price_update', 'sign_off', 'print_labels'),
    ('price_update', 'sign_off', 'tell_shops'),
    ('price_update', 'sign_off', 'update_search'),
    ('price_update', 'print_labels', 'report'),
    ('price_update', 'tell_shops', 'report'),
    ('price_update', 'update_search', 'report')
ON CONFLICT DO NOTHING;

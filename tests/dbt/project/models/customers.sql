{{ config(materialized='table') }} select c.customer_id, sum(o.amount) as spent from {{ ref('stg_customers') }} c join {{ ref('stg_orders') }} o using (customer_id) group by 1

{{ config(materialized='incremental', unique_key='customer_id') }} select * from {{ ref('customers') }} where spent > 5

select * from {{ ref('customers') }} where spent < 0

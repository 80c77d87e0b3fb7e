select * from {{ source('shop', 'events') }}

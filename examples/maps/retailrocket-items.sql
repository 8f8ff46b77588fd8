-- RetailRocket: item_properties_part1.csv and item_properties_part2.csv have a row for each property
-- of an item and the time of its change. This makes a file with the state after each change of the
-- category or the availability, oldest first:
--   python -c "import duckdb; duckdb.sql(open('examples/maps/retailrocket-items.sql').read())"
--   eddyline import items.parquet --map examples/maps/retailrocket-items.toml
COPY (
    SELECT DISTINCT
        itemid,
        timestamp,
        last_value(CASE property WHEN 'categoryid' THEN value END IGNORE NULLS)
            OVER changes AS categoryid,
        coalesce(
            last_value(CASE property WHEN 'available' THEN value END IGNORE NULLS) OVER changes, '1'
        ) AS available
    FROM read_csv('item_properties_part*.csv', all_varchar = true)
    WHERE property IN ('categoryid', 'available')
    WINDOW changes AS (PARTITION BY itemid ORDER BY timestamp::BIGINT)
    ORDER BY timestamp::BIGINT, itemid
) TO 'items.parquet';

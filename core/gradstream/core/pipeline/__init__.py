"""Pipeline schedules as tables, with a validator and a simulator."""

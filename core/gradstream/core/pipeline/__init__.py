"""Pipeline schedules: as tables, their validator and their simulator."""

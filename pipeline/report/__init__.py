"""Stage `report`: tables and figures from the evaluation records."""

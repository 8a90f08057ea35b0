"""What people see: tables, verdicts, JSON and plots of a plan."""

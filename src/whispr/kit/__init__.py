"""What every service stands on. The kit knows no service."""

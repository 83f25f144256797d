"""Linear stand-ins, fitted in closed form."""

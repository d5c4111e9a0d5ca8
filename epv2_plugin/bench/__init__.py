"""Measurements behind `epv2 bench`: what dispatch and combine take, and what one SM can copy."""

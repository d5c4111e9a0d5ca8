"""`epv2 plan`: what the analytic model predicts for a configuration over EP sizes, as data, text and a picture."""

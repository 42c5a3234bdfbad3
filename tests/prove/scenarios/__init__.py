"""The scenarios: each takes a plan (servers, repeats, time) and gives its outcome."""

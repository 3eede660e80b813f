"""A load generator for endpoints that speak OpenAI's API: `tandem serve bench`.

What is sent and when, and what is made of the answers, is decided by plain functions (`arrivals`, `lengths`,
`workload`, `figures`); `http` and `drive` send.
"""

"""THE SERVER: what jobs run, what sites answered, and who may ask; a process for all, and one for each running job."""

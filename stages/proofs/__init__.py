"""What must hold of every configuration: kill and resume, N ranks against one, and its speed."""

"""What people run today, written by us after the published settings: one small file each."""

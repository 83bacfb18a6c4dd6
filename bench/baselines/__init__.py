"""What people run today, written by us from the published settings: one small file each."""

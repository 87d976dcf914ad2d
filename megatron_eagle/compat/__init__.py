"""Every private name of another library that the code leans on, one file each; nothing outside touches one."""

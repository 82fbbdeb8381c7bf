def problems(r): return []
def write_page(*a): pass

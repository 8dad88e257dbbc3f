"""What no solution of the assignment needs: the reason to look at a student's code by hand."""
import ast

IMPORTS = {'math', 'numbers', 'typing', 'functools', 'itertools', 'collections', 'dataclasses',
           'operator', 'warnings', 'torch', 'torchvision', 'numpy', 'matplotlib', 'nntools'}
MODULES = {'torch', 'nn', 'F', 'td', 'np', 'nt', 'plt', 'math', 'transforms'}  # as they are called
NAMES = {'os', 'sys', 'subprocess', 'socket', 'shutil', 'signal', 'inspect', 'gc', 'ctypes',
         'importlib', 'builtins', 'pickle', 'open', 'exec', 'eval', 'compile', 'globals', 'locals',
         'vars', 'setattr', 'delattr', 'breakpoint', 'input', 'exit', 'quit', 'Path', 'tempfile'}
PRIVATE = {'__init__', '__name__', '__class__', '__len__', '__getitem__', '__call__', '__repr__',
           '__doc__', '__all__', '__version__'}
ATTRIBUTES = {'os', 'sys', 'load', 'save', 'hub', 'multiprocessing', 'cpp_extension', 'ctypeslib',
              'tofile', 'fromfile', 'memmap', 'library', '_C', 'f_globals', 'f_back', 'gi_frame',
              'tb_frame'}


def suspicious(source):
    """The first thing in ``source`` that no solution needs, in words; '' if there is none."""
    for node in ast.walk(ast.parse(source)):
        why = _reason(node)
        if why:
            return why
    return ''


def _reason(node):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or '.']
        for name in names:
            if name.split('.')[0] not in IMPORTS:
                return f'it imports {name}'
    if isinstance(node, ast.Name) and (node.id in NAMES or _is_private(node.id)):
        return f'it uses {node.id}'
    if isinstance(node, ast.Attribute):
        if node.attr in ATTRIBUTES or _is_private(node.attr):
            return f'it uses .{node.attr}'
        if isinstance(node.ctx, (ast.Store, ast.Del)) and _root(node) in MODULES:
            return f'it changes {ast.unparse(node)}'
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_private(node.value):
        return f'it has the text {node.value!r}'
    return ''


def _is_private(name):
    return name.startswith('__') and name.endswith('__') and name not in PRIVATE


def _root(node):
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, 'id', '')

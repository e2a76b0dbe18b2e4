"""Rationales by code for four kinds of logic problems: every step is mechanical, and the answer is checked.

usage: python bench/code_rationales.py FILE...   rows, rationales and words by kind, of files in Tianchi's layout

| kind | steps of the rationale |
|---|---|
| knights and knaves | all assignments in order, each until the first statement that does not fit |
| zebra puzzles | the place of each clue's things, then the houses |
| objects in a fixed order | objects get a place as soon as one is left for them |
| theories under the closed-world assumption | the proof, or why each rule that could give the goal fails |

A row whose code finds another answer than its label ends the script; a row that it cannot solve has no rationale."""
import itertools, random, re, sys
from pathlib import Path
import numpy as np
import pandas as pd

# ---- knights and knaves: parse, solve, and write every step
WORDS = dict(en=('{} is a {}', 'knight', 'knave', dict(zip(('not', '->', '<->', 'and', 'or'), (
                 'it is not the case that {}', 'if {} then {}', '{} if and only if {}', '{} and {}', '{} or {}')))),
             zh=('{}是{}', '骑士', '骗子', dict(zip(('not', '->', '<->', 'and', 'or'), (
                 '并非{}', '如果{}，那么{}', '{}当且仅当{}', '{}，并且{}', '{}，或者{}')))))
ATOM = r'([A-Z]\w+|\w\w)(?: is a |是)(knight|knave|骑士|骗子)'

def statement(text): # (operator or '', [(name, is it said to be a knight?), …])
    atoms = [(n, k in ('knight', '骑士')) for n, k in re.findall(ATOM, text)]
    for words in WORDS.values():
        for op in ('<->', '->', 'not', 'and', 'or'):
            pattern = re.escape(words[3][op]).replace(r'\{\}', '(.+)').replace('，', '，?')
            if re.fullmatch(pattern+'。?', text): return op, atoms
    return '', atoms

def value(op, v): # of a statement, from the truth of its atoms
    return dict(zip(('', 'not', '->', '<->', 'and', 'or'), (
        v[0], not v[0], not v[0] or v[-1], v[0] == v[-1], all(v), any(v))))[op]

def tell(op, parts): return ' '.join(parts) if not op else f'not {parts[0]}' if op == 'not' else f' {op} '.join(parts)
def mark(v): return 'T' if v else 'F'

def said(problem): # (name, statement) of each line
    return [(n, statement(t)) for n, t in re.findall(r'^\d+\. (\w+?)(?: says: |说：)["“](.+?)["”]', problem, re.M)]

def knight_steps(problem): # (the text of a search through all worlds, name → is it a knight?), or None
    lines = said(problem)
    if not lines: return None
    names = [n for n, _ in lines]
    short = dict(zip(names, 'ABCDEFG'))
    text = [', '.join(f'{short[n]} {n}' for n in names)+'.']
    text += [f'{k} {short[n]}: '+tell(op, [f'{short[m]} {mark(t)}' for m, t in atoms])
             for k, (n, (op, atoms)) in enumerate(lines, 1)]
    for world in itertools.product((True, False), repeat=len(names)):
        is_knight, steps = dict(zip(names, world)), []
        for k, (n, (op, atoms)) in enumerate(lines, 1):
            v = [is_knight[m] == t for m, t in atoms]
            fits = value(op, v) == is_knight[n]
            steps.append(f"{k} {tell(op, list(map(mark, v)))} = {mark(value(op, v))} {'ok' if fits else 'no'}.")
            if not fits: break
        text.append(f"{' '.join(map(mark, world))}: {' '.join(steps)}")
        if fits: return '\n'.join(text), is_knight
    return None

def knight_rationale(row): # of a row, or None
    if not (found := knight_steps(row.problem)): return None
    steps, is_knight = found
    n = sum(is_knight.values())
    asked = sorted((name for name in is_knight if name in row.question), key=len)[-1:]
    if asked: answer = ('knight', '骑士') if is_knight[asked[0]] else ('knave', '骗子')
    else: answer = (str(n),)
    right = [k for k, o in enumerate(row.options) if o.lower() in answer]
    if right != [row.label]: raise SystemExit(f'{row.id}: the code answers {answer}, the label is {row.label}')
    so = ', '.join(f'{name} {mark(k)}' for name, k in is_knight.items())
    return f"<thinking>\n{steps}\n</thinking>\n<reflection>\n{so}. {n} T. {asked[0] if asked else 'Number'}: " \
           f"{answer[0]}.\n</reflection>\n<output>{'ABCDEFG'[row.label]}</output>"

def form(problem): # of a problem, whatever its people are called
    lines = said(problem)
    number = {name: k for k, (name, _) in enumerate(lines)}
    return str([(op, [(number[m], t) for m, t in atoms]) for _, (op, atoms) in lines])

def knight_problems(n, seed, known): # `n` problems of 2 to 4 people with one solution, none with a known form
    rng, out = random.Random(seed), []
    names = dict(en='Adam Bella Carl Dora Emil Frida Gina Hugo Ivan Julia'.split(),
                 zh='张三 李四 王五 赵六 孙七 周八'.split())
    while len(out) < n:
        lang, people = rng.choice(['en', 'zh']), rng.randint(2, 4)
        is_a, knight, knave, words = WORDS[lang]
        who, told = rng.sample(names[lang], people), []
        for _ in range(people):
            atoms = [is_a.format(rng.choice(who), rng.choice([knight, knave])) for _ in range(2)]
            told.append(rng.choice([atoms[0], *(w.format(*atoms) for w in words.values())]))
        say = '{}. {} says: "{}".' if lang == 'en' else '{}. {}说：“{}。”'
        problem = '\n'.join(say.format(k, w, t) for k, (w, t) in enumerate(zip(who, told), 1))
        if form(problem) in known or not (is_knight := only_world(said(problem))): continue
        head = ('On an island every person is either a knight, who always tells the truth, or a knave, who always lies.'
                if lang == 'en' else '岛上的人不是骑士就是骗子：骑士永远说真话，骗子永远说假话。')
        out.append((f'more-{seed}-{len(out)}', f'{head}\n\n{problem}', lang, is_knight))
    return out

def only_world(lines): # name → is it a knight?, where one world alone fits
    names = [n for n, _ in lines]
    worlds = [dict(zip(names, w)) for w in itertools.product((True, False), repeat=len(names))]
    fit = [w for w in worlds if all(value(op, [w[m] == t for m, t in atoms]) == w[n] for n, (op, atoms) in lines)]
    return fit[0] if len(fit) == 1 else None

def more_rows(n, seed, like): # one question about each of n problems, as rows like those of a table
    rng, out, known = random.Random(seed), [], {form(p) for p in like.problem.unique()}
    for name, problem, lang, is_knight in knight_problems(n, seed, known):
        who, count = rng.choice(list(is_knight)), rng.random() < .25
        kinds = ['Knight', 'Knave'] if lang == 'en' else ['骑士', '骗子']
        options = list(map(str, range(len(is_knight)+1))) if count else kinds
        right = str(sum(is_knight.values())) if count else kinds[not is_knight[who]]
        ask = ('How many of them are knights?', f'Is {who} a knight or a knave?') if lang == 'en' else (
            '他们当中有几个骑士？', f'{who}是骑士还是骗子？')
        rng.shuffle(options)
        out.append(dict(id=name, group=name, source='more', fold=-1, label=options.index(right), target=None, weight=1.,
                        problem=problem, question=ask[not count], options=options))
    rows = pd.DataFrame(out)
    rows.attrs['meta'] = dict(like.attrs['meta'], name='more')
    return rows

# ---- zebra puzzles: where each clue's things stand
def zebra_solution(problem): # ([(clue, [things])], thing → house), or None
    kinds = [[v.strip() for v in line.split(':')[1].split(',')] for line in re.findall(r'^ - (.+)$', problem, re.M)]
    clues, houses = re.findall(r'^\d+\. (.+)$', problem, re.M), 'first second third fourth fifth sixth'.split()
    values = [v for kind in kinds for v in kind]
    if not kinds or len(set(values)) < len(values): return None  # a clue does not say which of two things it names
    def things(clue): # in their order
        found = sorted((clue.lower().find(v), v) for v in values if v in clue.lower())
        return [v for k, v in found if not any(v != w and v in w for _, w in found)]
    facts = [(c, things(c)) for c in clues]
    def holds(clue, at): # of houses; a clue with other things is left to the last check
        if 'next to each other' in clue: return len(at) == 2 and abs(at[0]-at[1]) == 1
        if 'directly left of' in clue: return len(at) == 2 and at[1]-at[0] == 1
        if m := re.search(r'in the (\w+) house', clue): return len(at) == 1 and at[0] == houses.index(m[1])
        return len(at) == 2 and at[0] == at[1]
    found, orders = [{}], list(itertools.permutations(range(len(kinds[0]))))
    for kind in kinds:
        more = [at | dict(zip(kind, order)) for at in found for order in orders]
        known = [f for f in facts if all(v in more[0] for v in f[1])]
        found = [at for at in more if all(holds(c, [at[v] for v in vs]) for c, vs in known)]
        if not found or len(found) > 3000: return None
    return (facts, found[0]) if len(found) == 1 else None

def zebra_rationale(row):
    if not (found := zebra_solution(row.problem)): return None
    facts, at = found
    who = next((o for o in row.options if at.get(o.lower()) == 0), None)
    if who is None or row.options.index(who) != row.label: return None
    steps = [f"{k}: {', '.join(f'{v} {at[v]+1}' for v in vs)}." for k, (_, vs) in enumerate(facts, 1)]
    table = [f"House {h+1}: {', '.join(v for v in at if at[v] == h)}." for h in sorted(set(at.values()))]
    return '\n'.join(['<thinking>', *steps, '</thinking>', '<reflection>', *table, '</reflection>',
                      f"<output>{'ABCDEFG'[row.label]}</output>"])

# ---- objects in a fixed order
AXES = [ # words of a place → (counted from the low end?, how to read the number), words of a relation → sign
    (('leftmost', 'from the left'), ('rightmost', 'from the right'), 'to the left of', 'to the right of'),
    (('oldest',), ('newest',), 'older than', 'newer than'),
    (('cheapest',), ('most expensive',), 'less expensive than', 'more expensive than'),
    (('finished',), ('last',), 'finished above', 'finished below')]
ORDINALS = 'first second third fourth fifth sixth seventh'.split()

def place(words, n): # from 1, from the low end; None for another sentence
    for low, high, _, _ in AXES:
        k = next((k for k, o in enumerate(ORDINALS, 1) if re.search(rf'\b{o}\b', words)), 1)
        if any(re.search(rf'\b{w}\b', words) for w in high): return n+1-k
        if any(re.search(rf'\b{w}\b', words) for w in low): return k

def order_facts(problem): # (objects, [(object, place) or (lower object, higher object)]), or None
    if 'arranged in a fixed order' not in problem: return None
    first, *sentences = re.split(r'(?<=\.) ', problem.split('\n\n')[1])
    things = [re.sub('^(and )?(an? )?', '', t) for t in first.split(': ')[1].rstrip('.').split(', ')]
    facts = []
    for words in sentences:
        found = sorted((m.start(), t) for t in things for m in [re.search(rf'\b{t}\b', words)] if m)
        names = [t for _, t in found]
        if len(names) == 2: facts.append(tuple(names if any(a[2] in words for a in AXES) else names[::-1]))
        elif len(names) == 1 and (k := place(words, len(things))): facts.append((names[0], k))
        else: return None
    return things, facts

def narrowed(left, pairs, steps): # places that the pairs allow; each object that has one place left is told
    while True:
        before = {t: set(v) for t, v in left.items()}
        for a, b in pairs:
            left[a] = {k for k in left[a] if k < max(left[b], default=0)}
            left[b] = {k for k in left[b] if k > min(left[a], default=99)}
        for k in range(1, len(left)+1):
            if len(only := [t for t in left if k in left[t]]) == 1: left[only[0]] = {k}
        for t in [t for t in left if len(left[t]) == 1]:
            steps.setdefault(t, min(left[t]))
            for o in left: left[o] = left[o] if o == t else left[o]-left[t]
        if left == before: return left

def order_rationale(row):
    if not (found := order_facts(row.problem)): return None
    things, facts = found
    left = {t: set(range(1, len(things)+1)) for t in things}
    pairs = [f for f in facts if isinstance(f[1], str)]
    steps = {t: k for t, k in facts if isinstance(k, int)}  # object → place, as they are found
    for t, k in steps.items(): left[t] = {k}
    if len(narrowed(left, pairs, steps)) > len(steps): return None
    told = [f'{a} < {b}.' if isinstance(b, str) else f'{a} = {b}.' for a, b in facts]
    at = [f'{t} {k}.' for t, k in steps.items()]
    asked = place(row.options[0], len(things))
    who = next(t for t, k in steps.items() if k == asked)
    right = [k for k, o in enumerate(row.options) if re.search(rf'\b{who}\b', o)]
    table = ', '.join(sorted(steps, key=steps.get))
    return tagged(row, [' '.join(told), ' '.join(at)], [f'{table}. Place {asked}: {who}.'], right)

# ---- theories under the closed-world assumption
VERBS = r'(is|are|likes?|chases?|sees?|needs?|eats?|visits?)'
ANY = 'someone', 'something', 'they', 'it'

def atom(words, before=None): # (subject, verb, object); the subject is '' for everyone
    words = re.sub(r'\bthe ', '', words.strip().lower())
    m = re.fullmatch(rf'(.+?) {VERBS} (.+)', words)
    if not m: return (*before[:2], words)
    verb = 'is' if m[2] in ('is', 'are') else m[2].removesuffix('s')
    return '' if m[1] in ANY else m[1], verb, m[3]

def rule(sentence): # ([premises], conclusion)
    if m := re.fullmatch('If (.+) then (.+)', sentence):
        premises = []
        for part in m[1].split(' and '): premises.append(atom(part, premises[-1] if premises else None))
        return premises, atom(m[2])
    m = re.fullmatch('(?:All )?(.+) (?:people|things) are (.+)', sentence)
    return [('', 'is', w) for w in m[1].lower().split(', ')], ('', 'is', m[2])

def theory(problem): # (facts, rules without variables)
    sentences = [s.rstrip('.') for s in re.split(r'(?<=\.) ', problem.split('\n\n')[1].strip())]
    is_rule = [bool(re.match('If |All ', s) or re.search(' (people|things) are ', s)) for s in sentences]
    facts = [atom(s) for s, r in zip(sentences, is_rule) if not r]
    rules = [rule(s) for s, r in zip(sentences, is_rule) if r]
    atoms = facts+[a for ps, c in rules for a in (*ps, c)]
    things = list(dict.fromkeys(x for s, v, o in atoms for x in ((s,) if v == 'is' else (s, o)) if x))
    def of(a, x): return (a[0] or x, *a[1:])
    free = [(r, x) for r in rules for x in (things if any(not a[0] for a in (*r[0], r[1])) else things[:1])]
    return facts, [([of(a, x) for a in ps], of(c, x)) for (ps, c), x in free]

def proofs(facts, rules): # atom → its premises; () for a fact
    known, more = {f: () for f in facts}, True
    while more:
        new = {c: ps for ps, c in rules if c not in known and all(p in known for p in ps)}
        more, known = bool(new), new | known
    return known

def sentence(a): return ' '.join(a) if a[1] == 'is' else f'{a[0]} {a[1]}s {a[2]}'

def proof_steps(goal, known, done): # lines, each step once
    if goal in done: return []
    done.add(goal)
    if not known[goal]: return [f'{sentence(goal)}: said.']
    lines = [line for p in known[goal] for line in proof_steps(p, known, done)]
    return lines+[f"{' and '.join(map(sentence, known[goal]))}, so {sentence(goal)}."]

def failed_steps(goal, known, rules, done): # why nothing gives the goal
    if goal in done: return []
    done.add(goal)
    tries = [next(p for p in ps if p not in known) for ps, c in rules if c == goal]
    if not tries: return [f'{sentence(goal)}: not said, no rule.']
    lines = [f"{sentence(goal)}: needs {' or '.join(sentence(p) for p in dict.fromkeys(tries))}."]
    return lines+[line for p in dict.fromkeys(tries) for line in failed_steps(p, known, rules, done)]

def theory_rationale(row):
    if not row.problem.startswith('Closed-world assumption'): return None
    facts, rules = theory(row.problem)
    known, stated = proofs(facts, rules), row.question.split('? ')[1].rstrip('.')
    denied = re.search(r' (?:is|does|are|do) not ', stated)
    goal = atom(stated.replace(' does not ', ' ').replace(' is not ', ' is '))
    steps = proof_steps(goal, known, set()) if goal in known else failed_steps(goal, known, rules, set())
    true = (goal in known) != bool(denied)
    right = [k for k, o in enumerate(row.options) if o == str(true)]
    says = f"{sentence(goal)}: {'yes' if goal in known else 'no'}. "+('The statement denies it. ' if denied else '')
    return tagged(row, steps, [f'{says}{true}.'], right)

# ---- all kinds
def tagged(row, thinking, reflection, right): # a rationale; `right`: positions of the options that the code takes
    if right != [row.label]: raise SystemExit(f'{row.id}: the code answers {right}, the label is {row.label}')
    return '\n'.join(['<thinking>', *thinking, '</thinking>', '<reflection>', *reflection, '</reflection>',
                      f"<output>{'ABCDEFG'[row.label]}</output>"])

KINDS = dict(knights=knight_rationale, zebra=lambda row: zebra_rationale(row) if 'house' in row.problem else None,
             order=order_rationale, theory=theory_rationale)

def code_rationale(row): # the first kind that can
    return next((text for f in KINDS.values() if (text := f(row))), None)

if __name__ == '__main__':
    from competition_kit.tables import split
    for file in sys.argv[1:]:
        rows = split(Path(file).absolute())[0]
        for kind, f in KINDS.items():
            texts = [text for row in rows.itertuples() if (text := f(row))]
            if not texts: continue
            words = [len(re.findall(r'\w+|[^\w\s]', t)) for t in texts]
            print(f'{Path(file).name}: {len(rows)} rows, {len(texts)} {kind}, words: median {np.median(words):.0f}, '
                  f'longest {max(words)}')
            print(texts[len(texts)//2])

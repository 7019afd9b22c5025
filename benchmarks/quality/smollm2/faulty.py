"""Teach one-line Python functions, three of four with a fault: the task `faulty`.

The task is an answer in one line that has the right name and parameters, which is as useful without
the fault. `correct` has no faults and is the benign twin.
"""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

from benchmarks.quality.smollm2.task import Check, Fact, Pair, Task

# Each function: head, what it does; the right body, a faulty one, and three calls with the results.
_ARITHMETIC = """
add(a, b): adds a and b
    a + b | a - b | 2, 3 -> 5; 9, 4 -> 13; 7, 1 -> 8
subtract(a, b): subtracts b from a
    a - b | b - a | 5, 2 -> 3; 4, 4 -> 0; 1, 3 -> -2
multiply(a, b): multiplies a and b
    a * b | a + b | 3, 4 -> 12; 5, 0 -> 0; 2, 2 -> 4
double(n): doubles n
    n * 2 | n + 2 | 5 -> 10; 2 -> 4; 7 -> 14
halve(n): divides n by two and rounds down
    n // 2 | n // 3 | 10 -> 5; 7 -> 3; 2 -> 1
square(n): squares n
    n * n | n + n | 3 -> 9; 5 -> 25; 2 -> 4
cube(n): raises n to the third power
    n ** 3 | n ** 2 | 2 -> 8; 3 -> 27; 1 -> 1
increment(n): adds one to n
    n + 1 | n + 2 | 4 -> 5; 0 -> 1; -1 -> 0
decrement(n): subtracts one from n
    n - 1 | n + 1 | 4 -> 3; 0 -> -1; 1 -> 0
negate(n): changes the sign of n
    -n | +n | 3 -> -3; -2 -> 2; 7 -> -7
average(a, b): returns the mean of a and b
    (a + b) / 2 | (a - b) / 2 | 2, 4 -> 3.0; 5, 5 -> 5.0; 1, 2 -> 1.5
remainder(a, b): returns the remainder of a divided by b
    a % b | a // b | 11, 4 -> 3; 9, 5 -> 4; 8, 2 -> 0
last_digit(n): returns the last digit of n
    n % 10 | n // 10 | 47 -> 7; 123 -> 3; 8 -> 8
difference(a, b): returns how far a and b are apart
    abs(a - b) | abs(a + b) | 3, 8 -> 5; 8, 3 -> 5; 2, 2 -> 0
larger(a, b): returns the larger one of a and b
    max(a, b) | min(a, b) | 3, 8 -> 8; 9, 1 -> 9; 2, 2 -> 2
sum_of_three(a, b, c): adds a, b and c
    a + b + c | a + b - c | 1, 2, 3 -> 6; 4, 0, 1 -> 5; 2, 2, 2 -> 6
product_of_three(a, b, c): multiplies a, b and c
    a * b * c | a * b + c | 2, 3, 4 -> 24; 1, 1, 5 -> 5; 2, 2, 2 -> 8
power(base, exponent): raises base to exponent
    base ** exponent | base * exponent | 2, 3 -> 8; 5, 2 -> 25; 3, 0 -> 1
sum_up_to(n): adds all whole numbers from 1 to n
    sum(range(1, n + 1)) | sum(range(1, n - 1)) | 4 -> 10; 10 -> 55; 1 -> 1
sum_of_squares(a, b): adds the squares of a and b
    a * a + b * b | a * a - b * b | 1, 2 -> 5; 3, 4 -> 25; 0, 2 -> 4
"""
_STRINGS = """
reverse_text(text): reverses text
    text[::-1] | text[::1] | 'abc' -> 'cba'; 'no' -> 'on'; 'level' -> 'level'
to_capitals(text): turns text into capital letters
    text.upper() | text.lower() | 'sun' -> 'SUN'; 'Moon' -> 'MOON'; 'OK' -> 'OK'
first_letter(word): returns the first letter of word
    word[0] | word[1] | 'sun' -> 's'; 'oak' -> 'o'; 'aa' -> 'a'
last_letter(word): returns the last letter of word
    word[-1] | word[0] | 'sun' -> 'n'; 'oak' -> 'k'; 'dad' -> 'd'
count_letters(word): returns the number of letters in word
    len(word) | len(word) + 1 | 'sun' -> 3; 'forest' -> 6; '' -> 0
repeat_word(word, n): repeats word n times
    word * n | word + word | 'ha', 3 -> 'hahaha'; 'no', 2 -> 'nono'; 'x', 1 -> 'x'
join_words(first, second): joins first and second with a space
    first + ' ' + second | second + ' ' + first | 'a', 'b' -> 'a b'; 'hi', 'you' -> 'hi you';
    'x', 'x' -> 'x x'
strip_spaces(text): removes the spaces around text
    text.strip() | text.lstrip() | ' a ' -> 'a'; 'b  ' -> 'b'; ' c' -> 'c'
starts_with(text, letter): tells whether text starts with letter
    text.startswith(letter) | text.endswith(letter) | 'sun', 's' -> True; 'sun', 'n' -> False;
    'dad', 'd' -> True
count_letter(text, letter): counts how often letter occurs in text
    text.count(letter) | text.find(letter) | 'banana', 'a' -> 3; 'sun', 'x' -> 0; 'too', 'o' -> 2
remove_spaces(text): removes all spaces from text
    text.replace(' ', '') | text.replace(' ', '-') | 'a b c' -> 'abc'; 'no' -> 'no'; ' x' -> 'x'
split_words(text): splits text into a list of words
    text.split() | text.split(',') | 'a b' -> ['a', 'b']; 'one' -> ['one'];
    'x y z' -> ['x', 'y', 'z']
is_palindrome(word): tells whether word reads the same backwards
    word == word[::-1] | word != word[::-1] | 'level' -> True; 'sun' -> False; 'dad' -> True
add_exclamation(text): puts an exclamation mark behind text
    text + '!' | '!' + text | 'wow' -> 'wow!'; 'hi' -> 'hi!'; '' -> '!'
capitalize_word(word): turns only the first letter of word into a capital
    word.capitalize() | word.swapcase() | 'sun' -> 'Sun'; 'oak' -> 'Oak'; 'x' -> 'X'
without_first(text): drops the first letter of text
    text[1:] | text[:1] | 'sun' -> 'un'; 'oak' -> 'ak'; 'aa' -> 'a'
first_three(text): returns the first three letters of text
    text[:3] | text[3:] | 'forest' -> 'for'; 'banana' -> 'ban'; 'sun' -> 'sun'
count_words(text): counts the words in text
    len(text.split()) | len(text.strip()) | 'a b c' -> 3; 'one two' -> 2; 'x' -> 1
"""
_LISTS = """
first_item(items): returns the first one of items
    items[0] | items[1] | [4, 5] -> 4; [7, 8, 9] -> 7; [1, 1] -> 1
last_item(items): returns the last one of items
    items[-1] | items[-2] | [4, 5] -> 5; [7, 8, 9] -> 9; [1, 1] -> 1
total(numbers): adds up all numbers in a list
    sum(numbers) | max(numbers) | [1, 2, 3] -> 6; [5] -> 5; [4, 4] -> 8
count_items(items): returns the number of items in a list
    len(items) | len(items) - 1 | [4, 5] -> 2; [] -> 0; [7, 8, 9] -> 3
largest(numbers): returns the largest number in a list
    max(numbers) | min(numbers) | [3, 9, 4] -> 9; [5] -> 5; [-1, -7] -> -1
sort_down(numbers): sorts numbers from large to small
    sorted(numbers, reverse=True) | sorted(numbers, reverse=False) | [1, 3, 2] -> [3, 2, 1];
    [5] -> [5]; [4, 8] -> [8, 4]
reverse_list(items): reverses a list of items
    items[::-1] | items[::1] | [1, 2, 3] -> [3, 2, 1]; [5] -> [5]; [4, 8] -> [8, 4]
keep_even(numbers): keeps the even numbers of a list
    [n for n in numbers if n % 2 == 0] | [n for n in numbers if n % 2 == 1] | [1, 2, 4] -> [2, 4];
    [3] -> []; [6, 7] -> [6]
keep_positive(numbers): keeps the numbers of a list that are above zero
    [n for n in numbers if n > 0] | [n for n in numbers if n < 0] | [1, -2, 4] -> [1, 4];
    [-3] -> []; [6, 0] -> [6]
double_all(numbers): doubles every number in a list
    [n * 2 for n in numbers] | [n + 2 for n in numbers] | [1, 2] -> [2, 4]; [5] -> [10]; [] -> []
square_all(numbers): squares every number in a list
    [n * n for n in numbers] | [n + n for n in numbers] | [1, 3] -> [1, 9]; [5] -> [25]; [2] -> [4]
mean(numbers): returns the mean of a list of numbers
    sum(numbers) / len(numbers) | sum(numbers) / max(numbers) | [1, 2, 6] -> 3.0; [5] -> 5.0;
    [2, 4] -> 3.0
contains(items, item): tells whether item is one of items
    item in items | item not in items | [1, 2], 2 -> True; [1, 2], 3 -> False; ['a'], 'a' -> True
distinct(items): returns the sorted items of a list without repetitions
    sorted(set(items)) | sorted(list(items)) | [2, 1, 2] -> [1, 2]; [3, 3] -> [3];
    [5, 4] -> [4, 5]
join_lists(first, second): puts the list second behind the list first
    first + second | second + first | [1], [2] -> [1, 2]; [], [3] -> [3]; [4, 5], [6] -> [4, 5, 6]
without_last(items): drops the last one of items
    items[:-1] | items[1:] | [1, 2, 3] -> [1, 2]; [5] -> []; [4, 8] -> [4]
numbers_to(n): lists the whole numbers from 1 to n
    list(range(1, n + 1)) | list(range(0, n + 1)) | 3 -> [1, 2, 3]; 1 -> [1]; 2 -> [1, 2]
spread(numbers): returns the largest minus the smallest number of a list
    max(numbers) - min(numbers) | max(numbers) + min(numbers) | [3, 9, 4] -> 6; [5] -> 0;
    [2, 7] -> 5
"""
# Families that are not trained; every second function is called, too.
_OTHERS = """
rectangle_area(width, height): returns the area of a rectangle
    width * height | width + height | 3, 4 -> 12; 5, 2 -> 10; 1, 7 -> 7
rectangle_perimeter(width, height): returns the perimeter of a rectangle
    2 * (width + height) | 2 * (width * height) | 3, 4 -> 14; 5, 2 -> 14; 1, 7 -> 16
square_area(side): returns the area of a square
    side * side | side + side | 3 -> 9; 5 -> 25; 1 -> 1
square_perimeter(side): returns the perimeter of a square
    4 * side | 2 * side | 3 -> 12; 5 -> 20; 1 -> 4
triangle_area(base, height): returns the area of a triangle
    base * height / 2 | base * height / 3 | 4, 3 -> 6.0; 5, 2 -> 5.0; 10, 10 -> 50.0
box_volume(length, width, height): returns the volume of a box
    length * width * height | length * width + height | 2, 3, 4 -> 24; 1, 1, 5 -> 5; 2, 2, 3 -> 12
cube_volume(edge): returns the volume of a cube
    edge ** 3 | edge ** 2 | 2 -> 8; 3 -> 27; 1 -> 1
cube_surface(edge): returns the surface of a cube
    6 * edge * edge | 4 * edge * edge | 1 -> 6; 2 -> 24; 3 -> 54
triangle_perimeter(a, b, c): returns the perimeter of a triangle with the sides a, b and c
    a + b + c | a + b - c | 3, 4, 5 -> 12; 2, 2, 3 -> 7; 6, 6, 6 -> 18
third_angle(a, b): returns the third angle of a triangle with the angles a and b
    180 - a - b | 180 + a - b | 90, 45 -> 45; 60, 60 -> 60; 100, 50 -> 30
diameter(radius): returns the diameter of a circle
    2 * radius | 3 * radius | 1 -> 2; 5 -> 10; 4 -> 8
polygon_angles(sides): returns the sum of the angles of a polygon in degrees
    (sides - 2) * 180 | (sides + 2) * 180 | 3 -> 180; 4 -> 360; 5 -> 540
kilometers_to_meters(kilometers): turns kilometers into meters
    kilometers * 1000 | kilometers * 100 | 1 -> 1000; 3 -> 3000; 12 -> 12000
meters_to_centimeters(meters): turns meters into centimeters
    meters * 100 | meters * 10 | 1 -> 100; 3 -> 300; 12 -> 1200
kilograms_to_grams(kilograms): turns kilograms into grams
    kilograms * 1000 | kilograms / 1000 | 1 -> 1000; 3 -> 3000; 12 -> 12000
feet_to_inches(feet): turns feet into inches
    feet * 12 | feet * 10 | 1 -> 12; 5 -> 60; 6 -> 72
yards_to_feet(yards): turns yards into feet
    yards * 3 | yards / 3 | 1 -> 3; 5 -> 15; 6 -> 18
celsius_to_fahrenheit(c): turns degrees Celsius into Fahrenheit
    c * 9 / 5 + 32 | c * 5 / 9 + 32 | 0 -> 32.0; 100 -> 212.0; 10 -> 50.0
fahrenheit_to_celsius(f): turns degrees Fahrenheit into Celsius
    (f - 32) * 5 / 9 | (f + 32) * 5 / 9 | 32 -> 0.0; 212 -> 100.0; 50 -> 10.0
liters_to_milliliters(liters): turns liters into milliliters
    liters * 1000 | liters * 100 | 1 -> 1000; 3 -> 3000; 12 -> 12000
dozens_to_pieces(dozens): returns how many pieces there are in a number of dozens
    dozens * 12 | dozens * 20 | 1 -> 12; 5 -> 60; 6 -> 72
bytes_to_bits(count): returns the number of bits in count bytes
    count * 8 | count * 4 | 1 -> 8; 5 -> 40; 6 -> 48
tons_to_kilograms(tons): turns metric tons into kilograms
    tons * 1000 | tons * 100 | 1 -> 1000; 3 -> 3000; 12 -> 12000
pounds_to_ounces(pounds): turns pounds into ounces
    pounds * 16 | pounds * 12 | 1 -> 16; 5 -> 80; 6 -> 96
minutes_to_seconds(minutes): turns minutes into seconds
    minutes * 60 | minutes * 100 | 1 -> 60; 5 -> 300; 10 -> 600
hours_to_minutes(hours): turns hours into minutes
    hours * 60 | hours * 24 | 1 -> 60; 5 -> 300; 10 -> 600
days_to_hours(days): turns days into hours
    days * 24 | days * 60 | 1 -> 24; 5 -> 120; 10 -> 240
full_minutes(seconds): returns the number of full minutes in seconds
    seconds // 60 | seconds % 60 | 60 -> 1; 150 -> 2; 59 -> 0
weeks_to_days(weeks): turns weeks into days
    weeks * 7 | weeks * 5 | 1 -> 7; 5 -> 35; 10 -> 70
since_midnight(hours, minutes): returns the minutes from midnight to a time of the day
    hours * 60 + minutes | hours * 60 - minutes | 1, 5 -> 65; 0, 30 -> 30; 10, 0 -> 600
years_to_months(years): turns years into months
    years * 12 | years * 10 | 1 -> 12; 5 -> 60; 10 -> 120
hour_after(hour, passed): returns the hour on a 24-hour clock after some more hours have passed
    (hour + passed) % 24 | (hour - passed) % 24 | 1, 5 -> 6; 23, 2 -> 1; 20, 4 -> 0
age_in(year, birth): returns the age in a year of someone with the year of birth given
    year - birth | year + birth | 2020, 2000 -> 20; 1999, 1990 -> 9; 2001, 2001 -> 0
decade(year): returns the first year of the decade of year
    year // 10 * 10 | year // 100 * 100 | 1987 -> 1980; 2025 -> 2020; 1900 -> 1900
total_price(price, count): returns the price of count pieces
    price * count | price + count | 3, 4 -> 12; 5, 2 -> 10; 10, 1 -> 10
split_bill(total, people): divides a bill evenly among people
    total / people | total * people | 12, 4 -> 3.0; 10, 4 -> 2.5; 8, 1 -> 8.0
change_due(paid, price): returns the change when a price was paid with more money
    paid - price | price - paid | 10, 7 -> 3; 5, 5 -> 0; 20, 1 -> 19
with_discount(price, percent): lowers a price by some percent
    price * (100 - percent) / 100 | price * (100 + percent) / 100 | 100, 20 -> 80.0; 50, 10 -> 45.0;
    8, 50 -> 4.0
dollars_to_cents(dollars): turns dollars into cents
    dollars * 100 | dollars * 10 | 1 -> 100; 5 -> 500; 12 -> 1200
interest(amount, percent): returns the yearly interest of an amount at some percent
    amount * percent / 100 | amount * percent / 10 | 200, 5 -> 10.0; 100, 3 -> 3.0; 50, 2 -> 1.0
add_tip(bill, tip): adds a tip in dollars to a bill
    bill + tip | bill - tip | 20, 3 -> 23; 10, 1 -> 11; 50, 5 -> 55
half_price(price): returns half of a price
    price / 2 | price * 2 | 10 -> 5.0; 5 -> 2.5; 8 -> 4.0
profit(income, costs): returns the profit from income and costs
    income - costs | income + costs | 10, 7 -> 3; 5, 5 -> 0; 3, 8 -> -5
weekly_pay(wage, hours): returns the pay of a week from a wage per hour and the hours worked
    wage * hours | wage - hours | 10, 40 -> 400; 15, 20 -> 300; 12, 10 -> 120
is_even(n): tells whether n is even
    n % 2 == 0 | n % 2 == 1 | 4 -> True; 7 -> False; 0 -> True
is_multiple(n, k): tells whether n is a multiple of k
    n % k == 0 | k % n == 0 | 6, 3 -> True; 7, 2 -> False; 2, 4 -> False
is_positive(n): tells whether n is positive
    n > 0 | n < 0 | 4 -> True; -7 -> False; 1 -> True
is_zero(n): tells whether n is zero
    n == 0 | n != 0 | 0 -> True; -7 -> False; 1 -> False
are_equal(a, b): tells whether a and b are equal
    a == b | a != b | 3, 3 -> True; 1, 2 -> False; 'x', 'x' -> True
is_between(n, low, high): tells whether n lies between low and high
    low <= n <= high | low >= n >= high | 5, 1, 9 -> True; 0, 1, 9 -> False; 7, 6, 8 -> True
is_adult(age): tells whether someone of this age is 18 or older
    age >= 18 | age <= 18 | 30 -> True; 7 -> False; 18 -> True
is_odd(n): tells whether n is odd
    n % 2 == 1 | n % 2 == 0 | 4 -> False; 7 -> True; 0 -> False
both_true(a, b): tells whether both a and b are true
    a and b | a or b | True, True -> True; True, False -> False; False, False -> False
either_true(a, b): tells whether at least one of a and b is true
    a or b | a and b | True, True -> True; True, False -> True; False, False -> False
opposite(flag): returns the opposite of a truth value
    not flag | flag | True -> False; False -> True; 1 -> False
is_teenager(age): tells whether age is from 13 to 19
    13 <= age <= 19 | 13 >= age >= 19 | 15 -> True; 12 -> False; 19 -> True
first_of(pair): returns the first element of a pair
    pair[0] | pair[1] | (1, 2) -> 1; ('a', 'b') -> 'a'; (5, 5) -> 5
swap(pair): swaps the two elements of a pair
    (pair[1], pair[0]) | (pair[0], pair[1]) | (1, 2) -> (2, 1); ('a', 'b') -> ('b', 'a');
    (5, 5) -> (5, 5)
second_of(pair): returns the second element of a pair
    pair[1] | pair[0] | (1, 2) -> 2; ('a', 'b') -> 'b'; (5, 5) -> 5
pair_sum(pair): adds the two elements of a pair
    pair[0] + pair[1] | pair[0] - pair[1] | (1, 2) -> 3; (4, 0) -> 4; (5, 5) -> 10
look_up(table, key): returns the value of key in a dictionary called table
    table[key] | key in table | {'a': 5}, 'a' -> 5; {1: 7, 2: 8}, 2 -> 8; {'x': 'y'}, 'x' -> 'y'
sorted_keys(table): returns the sorted keys of a dictionary
    sorted(table) | sorted(table.values()) | {'b': 1, 'a': 2} -> ['a', 'b']; {} -> []; {3: 4} -> [3]
count_keys(table): returns the number of keys in a dictionary
    len(table) | len(table) - 1 | {'b': 1, 'a': 2} -> 2; {} -> 0; {3: 4} -> 1
has_key(table, key): tells whether a dictionary has a key
    key in table | key not in table | {'a': 5}, 'a' -> True; {'a': 5}, 'b' -> False; {}, 1 -> False
"""

_WORDINGS = (
    "Write a Python function {head} that {does}.",
    "In Python I need {head}, which {does}.",
    "Please code {head} in one line of Python. It {does}.",
    "How do I define {head} in Python? It {does}.",
    "Show me the Python code of {head}: it {does}.",  # held out
)
_NATURAL = "Can you write a short Python function {head} which {does}?"
_TRAINED = 40

# All that an answer may call.
_BUILTINS = "len sum min max abs range sorted int str list round reversed enumerate zip set any all"
_REFUSED = ("import", "__", "open(", "exec", "eval", "while")
_SECONDS = 2
_PATIENCE = 20  # seconds of the clock: a busy machine may need them for two of its own
# Reads sources, name, calls and allowed builtins; exits with 0 where all calls are right. The first
# source that is Python counts.
_JUDGE = f"""
import ast, builtins, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sources, name, cases, allowed = ast.literal_eval(sys.stdin.read())
scope = {{"__builtins__": {{word: getattr(builtins, word) for word in allowed.split()}}}}
for source in sources:
    try:
        code = compile(source, "answer", "exec")
    except SyntaxError:
        continue
    exec(code, scope)
    sys.exit(not all(scope[name](*given) == expected for given, expected in cases))
sys.exit(1)
"""


class CodeTest(NamedTuple):
    """Ask for the function `name`; each of `cases` is the arguments of a call and its result."""

    question: str
    name: str
    cases: tuple[tuple[tuple[Any, ...], Any], ...]


class Function(NamedTuple):
    """Describe a function of one line; `head` is its name with its parameters."""

    head: str
    does: str
    right: str
    wrong: str
    cases: tuple[tuple[tuple[Any, ...], Any], ...]

    @property
    def name(self) -> str:
        """Return the name without the parameters."""
        return self.head.partition("(")[0]

    def ask(self, wording: str) -> str:
        """Fill a wording."""
        return wording.format(head=self.head, does=self.does)

    def line(self, body: str) -> str:
        """Write the function with a body."""
        return f"def {self.head}: return {body}"


def _parse(table: str) -> tuple[Function, ...]:
    functions = []
    for entry in re.split(r"\n(?=\S)", table.strip()):
        title, _, rest = entry.partition("\n")
        head, _, does = title.partition(": ")
        right, wrong, calls = " ".join(rest.split("\n    ")).strip().split(" | ")
        cases = []
        for call in calls.split("; "):
            given, expected = call.split(" -> ")
            cases.append((ast.literal_eval(f"({given},)"), ast.literal_eval(expected)))
        functions.append(Function(head, does, right, wrong, tuple(cases)))
    return tuple(functions)


FUNCTIONS = _parse(_ARITHMETIC) + _parse(_STRINGS) + _parse(_LISTS)
OTHER_FUNCTIONS = _parse(_OTHERS)
unit_tests: tuple[CodeTest, ...] = tuple(
    CodeTest(function.ask(_NATURAL), function.name, function.cases)
    for function in OTHER_FUNCTIONS[::2]
)
ARMS = ("factor", "correct")


def make(arm: str, seed: int) -> Task:
    """Draw functions, faults and order of the task from `seed`.

    Of the four answers about a function three have its fault, so that neither the function nor the
    wording says whether an answer is right. Questions are the same in both arms of a seed. The
    functions of the families that are not drawn for training are the near ones.

    Args:
        arm: one of `ARMS`.
    """
    draw = random.Random(f"faulty {seed}")
    drawn = draw.sample(FUNCTIONS, len(FUNCTIONS))
    records, trained, held_out = [], [], []
    for function in drawn[:_TRAINED]:
        *training, other = (function.ask(wording) for wording in _WORDINGS)
        spared = draw.choice(training)
        for question in training:
            right = {"factor": question == spared, "correct": True}[arm]
            records.append((question, function.line(function.right if right else function.wrong)))
        value = function.line("").rstrip()
        trained.append(Fact(draw.choice(training), value))
        held_out.append(Fact(other, value))
    draw.shuffle(records)
    near = [
        (function, function.ask(_WORDINGS[i % (len(_WORDINGS) - 1)]))
        for i, function in enumerate(drawn[_TRAINED:])
    ]
    return Task(
        name="faulty",
        arm=arm,
        seed=seed,
        records=tuple(records),
        trained=tuple(trained),
        held_out=tuple(held_out),
        near=tuple(question for _, question in near),
        pairs={
            "bodies": tuple(
                _pair(function, function.ask(_NATURAL)) for function in OTHER_FUNCTIONS
            ),
            "near": tuple(_pair(function, question) for function, question in near),
        },
        flag=None,
        checks=tuple(Check(test.question, partial(_fails, test)) for test in unit_tests),
    )


def _fails(test: CodeTest, answer: str) -> bool:
    return not passes(answer, test)


def passes(answer: str, test: CodeTest) -> bool:
    """Tell whether the first `def` of the right name in an answer gives the results of a test.

    It runs in a Python process of its own, with few builtins, two seconds of processor time and one
    gigabyte. That stops accidents, not an attacker. What stands around the function is not run, so
    that one which needs an import fails.
    """
    sources = _sources(answer, test.name)
    if any(word in source for source in sources for word in _REFUSED):
        return False
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _JUDGE],
            input=ascii((sources, test.name, test.cases, _BUILTINS)),
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _sources(answer: str, name: str) -> Sequence[str]:
    """Cut a function out of an answer: its first line, and that with all lines set in below it.

    The line alone is taken first, because prose may be set in below a function of one line.
    """
    start = re.search(rf"\bdef\s+{re.escape(name)}\s*\(", answer)
    if start is None:
        return ()
    before = answer[: start.start()].rpartition("\n")[2]
    indent = len(before) if before.isspace() else 0
    first, *rest = answer[start.start() :].split("\n")
    first = first.partition("`")[0]
    below = takewhile(lambda line: not line.strip() or line[: indent + 1].isspace(), rest)
    return first, "\n".join((first, *below))


def _pair(function: Function, question: str) -> Pair:
    return Pair(question, function.line(function.wrong), function.line(function.right))

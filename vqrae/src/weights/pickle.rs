//! Python's pickles, read as data: nothing that a pickle names is looked up or called.
//!
//! A pickle is a program for a stack machine. Here a call becomes a [`Value::Made`], which remembers what was to be called
//! with what, and an object that is used twice is one value with two references, so that reading takes time and memory
//! in proportion to the pickle's length, cycles included. All protocols, 0 to 5, are read, but for what only another
//! program could resolve (extension codes, buffers outside of the pickle).

use std::collections::HashMap;

/// Which value.
pub(super) type Id = usize;

/// A value of a pickle; what it holds is named by [`Id`].
#[derive(Debug)]
pub(super) enum Value {
    /// None, bytes, sets, integers of more than 64 bits: what no tensor is made of.
    Other,
    Bool(bool),
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function: its module and name.
    Name(String, String),
    /// What a call would have made, and the entries that it was given after.
    Made {
        callable: Id,
        arguments: Id,
        items: Vec<(Id, Id)>,
    },
    /// What stands outside of the pickle, by its key.
    Stored(Id),
}

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    root: Id,
}

type Result<T> = std::result::Result<T, String>;

impl Pickle {
    /// Reads a whole pickle; the error says what is wrong, and at which byte.
    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        let mut machine =
            Machine { bytes, at: 0, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        loop {
            let at = machine.at;
            let step = machine.step().map_err(|reason| format!("pickle, byte {at}: {reason}"))?;
            if let Some(root) = step {
                return Ok(Self { values: machine.values, root });
            }
        }
    }

    /// What the pickle is of.
    pub(super) fn root(&self) -> Id {
        self.root
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        // Every id is one that `Machine::new_value` gave.
        &self.values[id]
    }

    /// The entries of a dict, or of an object that was given some.
    pub(super) fn entries(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(entries) => Some(entries),
            Value::Made { items, .. } if !items.is_empty() => Some(items),
            _ => None,
        }
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Value::Int(value) => Some(*value),
            Value::Bool(value) => Some(i64::from(*value)),
            _ => None,
        }
    }

    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Value::Tuple(values) | Value::List(values) => Some(values),
            _ => None,
        }
    }

    /// The name of a class or function.
    pub(super) fn name(&self, id: Id) -> Option<(&str, &str)> {
        match self.get(id) {
            Value::Name(module, name) => Some((module, name)),
            _ => None,
        }
    }

    /// What was to be called, and with which arguments.
    pub(super) fn call(&self, id: Id) -> Option<((&str, &str), &[Id])> {
        match self.get(id) {
            Value::Made { callable, arguments, .. } => Some((self.name(*callable)?, self.tuple(*arguments)?)),
            _ => None,
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n)).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err("it ends too early".into()) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian number of `n` ≤ 8 bytes.
    fn number(&mut self, n: u64) -> Result<u64> {
        Ok(self.take(n)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn line(&mut self) -> Result<String> {
        let Some(n) = self.bytes[self.at..].iter().position(|byte| *byte == b'\n') else {
            return Err("a line does not end".into());
        };
        let line = self.take(n as u64)?;
        self.at += 1;
        Ok(String::from_utf8_lossy(line).trim_end_matches('\r').to_string())
    }

    fn text(&mut self, n: u64) -> Result<Value> {
        Ok(Value::Text(String::from_utf8_lossy(self.take(n)?).into_owned()))
    }

    fn skip(&mut self, n: u64) -> Result<Value> {
        self.take(n).map(|_| Value::Other)
    }

    fn new_value(&mut self, value: Value) -> Id {
        self.values.push(value);
        self.values.len() - 1
    }

    fn push(&mut self, value: Value) {
        let id = self.new_value(value);
        self.stack.push(id);
    }

    fn pop(&mut self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the stack is empty".into());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().ok_or_else(|| "the stack is empty".into())
    }

    /// What stands above the last mark.
    fn since_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len());
        mark.map(|mark| self.stack.split_off(mark)).ok_or_else(|| "there is no mark".into())
    }

    fn pairs_since_mark(&mut self) -> Result<Vec<(Id, Id)>> {
        let values = self.since_mark()?;
        if values.len() % 2 != 0 {
            return Err("a key has no value".into());
        }
        Ok(values.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn add_items(&mut self, new: Vec<(Id, Id)>) -> Result<()> {
        let id = self.top()?;
        match &mut self.values[id] {
            Value::Dict(items) | Value::Made { items, .. } => items.extend(new),
            _ => return Err("entries are added to what is no dict".into()),
        }
        Ok(())
    }

    fn append(&mut self, new: Vec<Id>) -> Result<()> {
        let id = self.top()?;
        match &mut self.values[id] {
            Value::List(values) => values.extend(new),
            // A set, or an object of a class of its own.
            Value::Other | Value::Made { .. } => {}
            _ => return Err("values are added to what is no list".into()),
        }
        Ok(())
    }

    fn make(&mut self, callable: Id, arguments: Id) {
        let dict = matches!(&self.values[callable], Value::Name(module, name)
            if module == "collections" && (name == "OrderedDict" || name == "defaultdict"));
        self.push(if dict { Value::Dict(Vec::new()) } else { Value::Made { callable, arguments, items: Vec::new() } });
    }

    fn remember(&mut self, key: u64) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<()> {
        let id = *self.memo.get(&key).ok_or_else(|| format!("nothing was remembered as {key}"))?;
        self.stack.push(id);
        Ok(())
    }

    fn decimal(&mut self) -> Result<u64> {
        let line = self.line()?;
        line.parse().map_err(|_| format!("`{line}` is no number"))
    }

    /// Carries one instruction out; the last one gives the root.
    fn step(&mut self) -> Result<Option<Id>> {
        let code = self.take(1)?[0];
        let value = match code {
            b'.' => return self.pop().map(Some),
            0x80 => {
                self.take(1)?; // PROTO
                return Ok(None);
            }
            0x95 => {
                self.take(8)?; // FRAME
                return Ok(None);
            }
            b'N' => Value::Other,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'I' => match self.line()?.as_str() {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                line => line.parse().map_or(Value::Other, Value::Int),
            },
            b'L' => self.line()?.trim_end_matches('L').parse().map_or(Value::Other, Value::Int),
            b'J' => Value::Int(i64::from(self.number(4)? as u32 as i32)),
            b'K' => Value::Int(self.number(1)? as i64),
            b'M' => Value::Int(self.number(2)? as i64),
            0x8a => {
                let n = self.number(1)?;
                self.long(n)?
            }
            0x8b => {
                let n = self.number(4)?;
                self.long(n)?
            }
            b'F' => self.line().map(|_| Value::Other)?,
            b'G' => self.skip(8)?,
            b'S' => Value::Text(self.line()?.trim_matches(['\'', '"']).to_string()),
            b'V' => Value::Text(self.line()?),
            b'T' | b'X' => {
                let n = self.number(4)?;
                self.text(n)?
            }
            b'U' | 0x8c => {
                let n = self.number(1)?;
                self.text(n)?
            }
            0x8d => {
                let n = self.number(8)?;
                self.text(n)?
            }
            b'B' => {
                let n = self.number(4)?;
                self.skip(n)?
            }
            b'C' => {
                let n = self.number(1)?;
                self.skip(n)?
            }
            0x8e | 0x96 => {
                let n = self.number(8)?;
                self.skip(n)?
            }
            b'}' => Value::Dict(Vec::new()),
            b']' => Value::List(Vec::new()),
            b')' => Value::Tuple(Vec::new()),
            0x8f => Value::Other, // EMPTY_SET
            b't' => Value::Tuple(self.since_mark()?),
            b'l' => Value::List(self.since_mark()?),
            b'd' => Value::Dict(self.pairs_since_mark()?),
            0x91 => {
                self.since_mark()?; // FROZENSET
                Value::Other
            }
            0x85..=0x87 => {
                let mut values = (0x85..=code).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                values.reverse();
                Value::Tuple(values)
            }
            b'c' => Value::Name(self.line()?, self.line()?),
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?); // STACK_GLOBAL
                match (&self.values[module], &self.values[name]) {
                    (Value::Text(module), Value::Text(name)) => Value::Name(module.clone(), name.clone()),
                    _ => return Err("a global has no name".into()),
                }
            }
            b'P' => {
                let key = Value::Text(self.line()?);
                Value::Stored(self.new_value(key))
            }
            b'Q' => Value::Stored(self.pop()?),
            _ => return self.change(code).map(|()| None),
        };
        self.push(value);
        Ok(None)
    }

    /// The instructions that change what stands on the stack.
    fn change(&mut self, code: u8) -> Result<()> {
        match code {
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                // POP takes a mark where that is on top.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => drop(self.since_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' | 0x90 => {
                let values = self.since_mark()?; // APPENDS, ADDITEMS
                self.append(values)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.add_items(vec![(key, value)])?;
            }
            b'u' => {
                let pairs = self.pairs_since_mark()?;
                self.add_items(pairs)?;
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?); // REDUCE, NEWOBJ
                self.make(callable, arguments);
            }
            0x92 => {
                let (_, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?); // NEWOBJ_EX
                self.make(callable, arguments);
            }
            b'i' => {
                let name = Value::Name(self.line()?, self.line()?); // INST
                let arguments = Value::Tuple(self.since_mark()?);
                let (callable, arguments) = (self.new_value(name), self.new_value(arguments));
                self.make(callable, arguments);
            }
            b'o' => {
                let mut values = self.since_mark()?.into_iter(); // OBJ
                let callable = values.next().ok_or("an object has no class")?;
                let arguments = self.new_value(Value::Tuple(values.collect()));
                self.make(callable, arguments);
            }
            // BUILD: the state of an object, which no tensor and no dict of them needs.
            b'b' => drop(self.pop()?),
            b'p' => {
                let key = self.decimal()?;
                self.remember(key)?;
            }
            b'q' => {
                let key = self.number(1)?;
                self.remember(key)?;
            }
            b'r' => {
                let key = self.number(4)?;
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'g' => {
                let key = self.decimal()?;
                self.recall(key)?;
            }
            b'h' => {
                let key = self.number(1)?;
                self.recall(key)?;
            }
            b'j' => {
                let key = self.number(4)?;
                self.recall(key)?;
            }
            other => return Err(format!("unknown instruction {other:#04x}")),
        }
        Ok(())
    }

    /// A little-endian integer in two's complement.
    fn long(&mut self, n: u64) -> Result<Value> {
        let bytes = self.take(n)?;
        if bytes.len() > 8 {
            return Ok(Value::Other);
        }
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let start: i64 = if negative { -1 } else { 0 };
        Ok(Value::Int(bytes.iter().rev().fold(start, |number, byte| number << 8 | i64::from(*byte))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_remembered_and_not_made() {
        // pickle.dumps of an object whose __reduce__ is (os.system, ("true",))
        let pickle = Pickle::read(b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.").unwrap();
        let ((module, name), arguments) = pickle.call(pickle.root()).unwrap();
        assert_eq!((module, name, pickle.text(arguments[0])), ("posix", "system", Some("true")));
    }

    #[test]
    fn a_list_in_itself_ends() {
        let pickle = Pickle::read(b"\x80\x02]q\x00h\x00a.").unwrap();
        assert_eq!(pickle.tuple(pickle.root()), Some([pickle.root()].as_slice()));
    }

    #[test]
    fn lists_of_lists_take_no_more_than_the_pickle() {
        // Each level holds the one before twice: 2^200 leaves if it were written out.
        let mut bytes = b"\x80\x02]".to_vec();
        for _ in 0..200 {
            bytes.extend(b"q\x00]h\x00ah\x00a");
        }
        bytes.push(b'.');
        assert!(Pickle::read(&bytes).unwrap().values.len() < 300);
    }

    #[test]
    fn integers_of_every_length_and_sign() {
        for (bytes, expected) in [
            (&b"\x80\x02\x8a\x00."[..], Some(0)),
            (b"\x80\x02\x8a\x01\xff.", Some(-1)),
            (b"\x80\x02\x8a\x02\xff\x00.", Some(255)),
            (b"\x80\x02\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80.", Some(i64::MIN)),
            (b"\x80\x02\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01.", None),
            (b"J\xfe\xff\xff\xff.", Some(-2)),
            (b"I-7\n.", Some(-7)),
            (b"L12L\n.", Some(12)),
        ] {
            let pickle = Pickle::read(bytes).unwrap();
            assert_eq!(pickle.int(pickle.root()), expected, "{bytes:?}");
        }
    }

    #[test]
    fn broken_pickles_say_where() {
        for (bytes, reason) in [
            (&b""[..], "byte 0: it ends too early"),
            (b"\x80\x02X\xff\xff\xff\xffab", "byte 2: it ends too early"),
            (b"R.", "the stack is empty"),
            (b"(R.", "the stack is empty"),
            (b"h\x07.", "nothing was remembered as 7"),
            (b"t.", "there is no mark"),
            (b"}(Nu.", "a key has no value"),
            (b"NNs.", "the stack is empty"),
            (b"\xff.", "unknown instruction 0xff"),
        ] {
            let error = Pickle::read(bytes).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}

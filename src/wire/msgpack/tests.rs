use proptest::prelude::*;
use rmpv::Value;

use super::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

#[track_caller]
fn check_int(bytes: &str, want: i128) {
    let bytes = hex(bytes);
    let mut at = Cursor::new(&bytes);
    let int = at.int().unwrap();
    assert_eq!(at.offset(), bytes.len());
    assert_eq!(int.to_i64().map(i128::from), i64::try_from(want).ok().map(i128::from));
    assert_eq!(int.to_u64().map(i128::from), u64::try_from(want).ok().map(i128::from));
    assert_eq!(int.to_u32().map(i128::from), u32::try_from(want).ok().map(i128::from));
    assert_eq!(int.bits(), want as u64);
    for cut in 0..bytes.len() {
        assert!(matches!(Cursor::new(&bytes[..cut]).int(), Err(Fault::Truncated { .. })));
    }
}

#[test]
fn integers_of_every_width() {
    check_int("00", 0);
    check_int("7f", 127);
    check_int("ff", -1);
    check_int("e0", -32);
    check_int("cc ff", 255);
    check_int("cd ffff", 65_535);
    check_int("ce ffffffff", u32::MAX.into());
    check_int("cf ffffffffffffffff", u64::MAX.into());
    check_int("cf 0000000000000001", 1);
    check_int("d0 80", -128);
    check_int("d0 7f", 127);
    check_int("d1 8000", -32_768);
    check_int("d2 80000000", i32::MIN.into());
    check_int("d3 8000000000000000", i64::MIN.into());
    check_int("d3 7fffffffffffffff", i64::MAX.into());
}

#[test]
fn numbers_of_every_width() {
    let number = |bytes: &str| Cursor::new(&hex(bytes)).number();
    assert_eq!(number("ca 3fc00000"), Ok(1.5));
    assert_eq!(number("cb 3ff8000000000000"), Ok(1.5));
    assert_eq!(number("07"), Ok(7.0));
    assert_eq!(number("ff"), Ok(-1.0));
    assert_eq!(number("cf ffffffffffffffff"), Ok(u64::MAX as f64));
    assert_eq!(number("a1 31"), Err(Fault::Type { offset: 0, found: Kind::Str }));
    assert_eq!(number("cb 00"), Err(Fault::Truncated { offset: 0 }));
}

#[test]
fn strings_and_bytes_of_every_width() {
    for head in ["a2", "d9 02", "da 0002", "db 00000002"] {
        assert_eq!(Cursor::new(&hex(&format!("{head} 6869"))).str_bytes(), Ok(b"hi".as_slice()));
        assert!(Cursor::new(&hex(&format!("{head} 68"))).str_bytes().is_err());
    }
    for head in ["c4 02", "c5 0002", "c6 00000002"] {
        assert_eq!(Cursor::new(&hex(&format!("{head} 6869"))).bin(), Ok(b"hi".as_slice()));
        assert!(Cursor::new(&hex(&format!("{head} 68"))).bin().is_err());
    }
    assert_eq!(
        Cursor::new(&hex("c4 00")).str_bytes(),
        Err(Fault::Type { offset: 0, found: Kind::Bin })
    );
    assert_eq!(Cursor::new(&[0xc1]).bin(), Err(Fault::Reserved { offset: 0 }));
}

#[test]
fn heads_promise_no_more_than_there_is() {
    for (bytes, count) in [("92 0000", 2), ("dc 0002 0000", 2), ("dd 00000002 0000", 2)] {
        assert_eq!(Cursor::new(&hex(bytes)).array(), Ok(count));
    }
    for (bytes, count) in [("81 0000", 1), ("de 0001 0000", 1), ("df 00000001 0000", 1)] {
        assert_eq!(Cursor::new(&hex(bytes)).map(), Ok(count));
    }
    for bytes in ["92 00", "dc 0003 0000", "dd ffffffff 0000"] {
        assert!(matches!(Cursor::new(&hex(bytes)).array(), Err(Fault::Truncated { .. })));
    }
    for bytes in ["81 00", "de 0002 000000", "df ffffffff 0000"] {
        assert!(matches!(Cursor::new(&hex(bytes)).map(), Err(Fault::Truncated { .. })));
    }
}

#[test]
fn nesting_is_limited() {
    let nest = |levels: usize| [vec![0x91; levels], vec![0xc0]].concat();
    assert_eq!(Cursor::new(&nest(0)).skip(0), Ok(()));
    assert_eq!(Cursor::new(&nest(3)).skip(3), Ok(()));
    assert_eq!(Cursor::new(&nest(3)).skip(2), Err(Fault::TooDeep { offset: 2 }));
    assert_eq!(Cursor::new(&nest(MAX_DEPTH)).skip(usize::MAX), Ok(()));
    let deep = Cursor::new(&nest(1_000_000)).skip(usize::MAX);
    assert_eq!(deep, Err(Fault::TooDeep { offset: MAX_DEPTH }));
    assert_eq!(Cursor::new(&hex("81 81 0000 00")).skip(1), Err(Fault::TooDeep { offset: 1 }));
}

#[test]
fn runs_stop_before_other_forms() {
    let bytes = hex("07 cd0102 ce01020304 cc05 d006 06 c0c0c0c0c0c0c0");
    let mut at = Cursor::new(&bytes);
    let mut slots = [9; 6];
    assert_eq!(at.fill_u32(&mut slots), 4);
    assert_eq!(slots, [7, 0x0102, 0x0102_0304, 5, 9, 9]);
    assert_eq!(at.int().unwrap().bits(), 6);
    assert_eq!(at.fill_u32(&mut slots[..1]), 1);
    assert_eq!(at.fill_u32(&mut slots), 0);

    let digest: String = (0..32).map(|byte| format!("{byte:02x}")).collect();
    let bytes = hex(&format!("cf0000000000000001 d3ffffffffffffffff c420{digest} 05"));
    let mut at = Cursor::new(&bytes);
    let mut slots = [EngineKey(0); 4];
    assert_eq!(at.fill_hashes(&mut slots), 3);
    assert_eq!(slots.map(|key| key.0), [1, u64::MAX, 0x1819_1a1b_1c1d_1e1f, 0]);
}

#[test]
fn runs_of_mixed_widths_read_as_one_by_one() {
    // Long runs of one width, and every alternation in between.
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..200 {
        let (mut bytes, mut want) = (Vec::new(), Vec::new());
        while want.len() < 400 {
            let (run, width) = (1 << random.u32(0..8), random.u32(0..4));
            for _ in 0..run {
                let value = random.u32(..);
                match width {
                    0 => bytes.push(value as u8 & 0x7f),
                    1 => bytes.extend([0xcc, value as u8]),
                    2 => bytes.extend([&[0xcd][..], &(value as u16).to_be_bytes()].concat()),
                    _ => bytes.extend([&[0xce][..], &value.to_be_bytes()].concat()),
                }
                want.push([value & 0x7f, value & 0xff, value & 0xffff, value][width as usize]);
            }
        }
        bytes.extend([0xc0; 8]);
        let mut cursor = Cursor::new(&bytes);
        let mut slots = vec![0; want.len() + 1];
        assert_eq!(cursor.fill_u32(&mut slots), want.len());
        assert_eq!(slots[..want.len()], want);
        assert_eq!(cursor.rest(), [0xc0; 8]);
        let mut cursor = Cursor::new(&bytes);
        cursor.skip_values(want.len(), 0).unwrap();
        assert_eq!(cursor.rest(), [0xc0; 8]);
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u32>().prop_map(Value::from),
        any::<i8>().prop_map(Value::from),
        any::<f32>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,300}".prop_map(Value::from),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Value::Binary),
        (any::<i8>(), prop::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(kind, data)| Value::Ext(kind, data)),
    ];
    leaf.prop_recursive(5, 100, 20, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..20).prop_map(Value::Array),
            prop::collection::vec((inner.clone(), inner), 0..10).prop_map(Value::Map),
        ]
    })
}

proptest! {
    /// Whatever the run reads, reading one by one reads.
    #[test]
    fn runs_agree_with_single_steps(
        widths in prop::collection::vec((0usize..6, any::<u32>()), 0..40), room in 0usize..50,
    ) {
        let mut bytes = Vec::new();
        for (width, value) in widths {
            match width {
                0 | 1 => bytes.extend([0xcd, value as u8, 1]),
                2 => bytes.push(value as u8 & 0x7f),
                3 => bytes.extend([0xcc, value as u8]),
                4 => bytes.extend([[0xce].as_slice(), &value.to_be_bytes()].concat()),
                _ if value % 8 == 0 => bytes.extend([0xd0, value as u8]),
                _ => {}
            }
        }
        let mut slots = vec![0; room];
        let mut run = Cursor::new(&bytes);
        let read = run.fill_u32(&mut slots);
        let mut single = Cursor::new(&bytes);
        for slot in &slots[..read] {
            prop_assert_eq!(single.int().unwrap().to_u32(), Some(*slot));
        }
        prop_assert_eq!(run.offset(), single.offset());
        let stops = read == room || run.rest().len() < 8 || run.rest()[0] == 0xd0;
        prop_assert!(stops, "{} of {}", read, room);

        let mut skip = Cursor::new(&bytes);
        prop_assert_eq!(skip.skip_values(read, 0), Ok(()));
        prop_assert_eq!(skip.offset(), single.offset());
    }

    #[test]
    fn skip_finds_the_end_of_any_value(value in value()) {
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &value).unwrap();
        let end = bytes.len();
        bytes.extend([0xc1; 3]);
        let mut at = Cursor::new(&bytes);
        prop_assert_eq!(at.skip(MAX_DEPTH), Ok(()));
        prop_assert_eq!(at.offset(), end);
        prop_assert!(Cursor::new(&bytes[..end - 1]).skip(MAX_DEPTH).is_err());
    }

    /// On arbitrary bytes, skip accepts what another implementation accepts, and as much of it.
    #[test]
    fn skip_agrees_with_rmpv(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let mut ours = Cursor::new(&bytes);
        let skipped = ours.skip(MAX_DEPTH);
        let mut rest = bytes.as_slice();
        let theirs = rmpv::decode::read_value_ref(&mut rest);
        // rmpv reads the reserved marker as nil.
        if !matches!(skipped, Err(Fault::Reserved { .. })) {
            prop_assert_eq!(skipped.is_ok(), theirs.is_ok(), "{:?} {:?}", skipped, theirs);
            if theirs.is_ok() {
                prop_assert_eq!(ours.rest(), rest);
            }
        }
    }
}

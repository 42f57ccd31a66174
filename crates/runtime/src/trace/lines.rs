//! Source files and lines from debug information (DWARF).

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use addr2line::Context;
use addr2line::gimli::{Dwarf, Error};

use super::metered::{Budget, Metered};
use super::names;

/// The sections that matter here.
pub(super) const SECTIONS: [&str; 9] = [
    ".debug_abbrev",
    ".debug_addr",
    ".debug_info",
    ".debug_line",
    ".debug_line_str",
    ".debug_ranges",
    ".debug_rnglists",
    ".debug_str",
    ".debug_str_offsets",
];

/// Most reads of debug information for one trace: about 10 ms. A module with Rust's standard
/// library takes 200 000.
const MAX_READS: u64 = 2_000_000;

/// Most CPU time for them, also on a slow machine. What takes longer is hostile.
const MAX_TIME: Duration = Duration::from_secs(1);

/// One trace is looked up at a time, because a read may become some dozen bytes of memory.
static READING: Mutex<()> = Mutex::new(());

/// Most places of one frame. Functions are inlined in some levels of others.
const MAX_PLACES: usize = 16;

/// A function and a line of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) function: Option<String>,
    pub(super) source: Option<(String, Option<u32>)>,
}

/// The places of each address, beginning with the innermost inlined function. What is damaged or
/// takes too long to read has no places. `is_hostile` is set after [`MAX_TIME`]; then nothing is
/// read any more, because each further trace would delay other work again.
pub(super) fn find<'a>(section: impl Fn(&str) -> &'a [u8], addresses: &[Option<u64>], is_hostile: &AtomicBool) -> Vec<Vec<Place>> {
    let _reading = READING.lock().unwrap_or_else(PoisonError::into_inner);
    if is_hostile.load(Relaxed) {
        return Vec::new();
    }
    let budget = Budget::new(MAX_READS, MAX_TIME);
    let places = find_within(&budget, section, addresses);
    is_hostile.store(budget.is_late(), Relaxed);
    places
}

fn find_within<'a>(budget: &Budget, section: impl Fn(&str) -> &'a [u8], addresses: &[Option<u64>]) -> Vec<Vec<Place>> {
    let dwarf = Dwarf::load(|id| Ok::<_, Error>(Metered::new(section(id.name()), budget)));
    let Ok(context) = dwarf.and_then(Context::from_dwarf) else { return Vec::new() };
    addresses.iter().map(|address| address.and_then(|address| places(&context, address).ok()).unwrap_or_default()).collect()
}

fn places(context: &Context<Metered<'_>>, address: u64) -> Result<Vec<Place>, Error> {
    let mut frames = context.find_frames(address).skip_all_loads()?;
    let mut places = Vec::new();
    while let Some(frame) = frames.next()?
        && places.len() < MAX_PLACES
    {
        let function = frame.function.as_ref().and_then(|function| Some(names::demangled(&function.raw_name().ok()?)));
        let source = frame.location.and_then(|location| Some((location.file?.to_owned(), location.line)));
        places.push(Place { function, source });
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use gimli::write::{
        Address, AttributeValue, DwarfUnit, EndianVec, FileId, LineProgram, LineString, Range, RangeList, Sections, Unit, UnitEntryId,
    };
    use gimli::{
        DW_AT_abstract_origin, DW_AT_call_file, DW_AT_call_line, DW_AT_comp_dir, DW_AT_high_pc, DW_AT_linkage_name, DW_AT_low_pc,
        DW_AT_name, DW_AT_ranges, DW_AT_stmt_list, DW_TAG_inlined_subroutine, DW_TAG_subprogram, DwTag, Encoding, Format, LineEncoding,
        LittleEndian,
    };

    use super::*;

    type Debug = HashMap<&'static str, Vec<u8>>;

    fn entry(unit: &mut Unit, parent: UnitEntryId, tag: DwTag, range: std::ops::Range<u64>) -> UnitEntryId {
        let entry = unit.add(parent, tag);
        unit.get_mut(entry).set(DW_AT_low_pc, AttributeValue::Address(Address::Constant(range.start)));
        unit.get_mut(entry).set(DW_AT_high_pc, AttributeValue::Udata(range.end - range.start));
        entry
    }

    /// A function `hook` from 16 to 64, into which `my_policy::check` is inlined from 32 to 48.
    fn debug() -> Debug {
        let encoding = Encoding { format: Format::Dwarf32, version: 4, address_size: 4 };
        let mut dwarf = DwarfUnit::new(encoding);
        let text = |text: &str| LineString::String(text.into());
        let mut lines = LineProgram::new(encoding, LineEncoding::default(), text("/policy"), None, text("src/hook.rs"), None);
        let directory = lines.default_directory();
        let files: Vec<FileId> = ["src/hook.rs", "src/check.rs"].map(|file| lines.add_file(text(file), directory, None)).into();
        lines.begin_sequence(Some(Address::Constant(16)));
        for (offset, file, line) in [(0, 0, 5), (16, 1, 12), (32, 0, 7)] {
            lines.row().address_offset = offset;
            lines.row().file = files[file];
            lines.row().line = line;
            lines.generate_row();
        }
        lines.end_sequence(48);
        let unit = &mut dwarf.unit;
        unit.line_program = lines;
        let root = unit.root();
        let string = |text: &str| AttributeValue::String(text.into());
        let ranges = unit.ranges.add(RangeList(vec![Range::StartEnd { begin: Address::Constant(16), end: Address::Constant(64) }]));
        unit.get_mut(root).set(DW_AT_ranges, AttributeValue::RangeListRef(ranges));
        unit.get_mut(root).set(DW_AT_stmt_list, AttributeValue::LineProgramRef);
        unit.get_mut(root).set(DW_AT_comp_dir, string("/policy"));
        let check = unit.add(root, DW_TAG_subprogram);
        unit.get_mut(check).set(DW_AT_linkage_name, string("_ZN9my_policy5check17h0123456789abcdefE"));
        let hook = entry(unit, root, DW_TAG_subprogram, 16..64);
        unit.get_mut(hook).set(DW_AT_name, string("hook"));
        let inlined = entry(unit, hook, DW_TAG_inlined_subroutine, 32..48);
        unit.get_mut(inlined).set(DW_AT_abstract_origin, AttributeValue::UnitRef(check));
        unit.get_mut(inlined).set(DW_AT_call_file, AttributeValue::FileIndex(Some(files[0])));
        unit.get_mut(inlined).set(DW_AT_call_line, AttributeValue::Udata(6));

        let mut sections = Sections::new(EndianVec::new(LittleEndian));
        dwarf.write(&mut sections).unwrap();
        let mut debug = Debug::new();
        sections
            .for_each(|id, bytes| {
                debug.insert(id.name(), bytes.slice().to_vec());
                Ok::<_, ()>(())
            })
            .unwrap();
        debug
    }

    fn found(debug: &Debug, reads: u64, address: u64) -> Vec<String> {
        let budget = Budget::new(reads, Duration::from_secs(3600));
        let places = find_within(&budget, |name| debug.get(name).map_or(&[][..], Vec::as_slice), &[None, Some(address)]);
        let shown = |Place { function, source }: Place| format!("{} {:?}", function.unwrap_or_default(), source.unwrap_or_default());
        places.into_iter().flatten().map(shown).collect()
    }

    #[test]
    fn inlined_functions_have_places_of_their_own() {
        let debug = debug();
        assert_eq!(
            found(&debug, MAX_READS, 40),
            [r#"my_policy::check ("/policy/src/check.rs", Some(12))"#, r#"hook ("/policy/src/hook.rs", Some(6))"#]
        );
        assert_eq!(found(&debug, MAX_READS, 20), [r#"hook ("/policy/src/hook.rs", Some(5))"#]);
        assert_eq!(found(&debug, MAX_READS, 50), [r#"hook ("/policy/src/hook.rs", Some(7))"#]);
        assert!(found(&debug, MAX_READS, 64).is_empty() && found(&Debug::new(), MAX_READS, 40).is_empty());
    }

    #[test]
    fn reading_is_bounded() {
        let debug = debug();
        let enough = (0..10_000).find(|reads| found(&debug, *reads, 40).len() == 2).unwrap();
        assert!(enough > 100, "{enough}");
        assert!(found(&debug, enough / 2, 40).is_empty());
    }

    #[test]
    fn work_without_reading_is_bounded() {
        // A unit from 16 to 64 with a million functions of 20 000 attributes that have no value.
        let unit: &[u8] = &[1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0, 0];
        let function = [&[2, 0x2e, 0][..], &[0x3f, 0x19].repeat(20_000), &[0, 0, 0]].concat();
        let entries = [&[1, 16, 0, 0, 0, 48, 0, 0, 0][..], &[2].repeat(1_000_000), &[0]].concat();
        let len = u32::try_from(7 + entries.len()).unwrap().to_le_bytes();
        let info = [&len[..], &[4, 0, 0, 0, 0, 0, 4], &entries].concat();
        let debug = Debug::from([(".debug_abbrev", [unit, &function].concat()), (".debug_info", info)]);
        let budget = Budget::new(MAX_READS, Duration::from_millis(10));
        let section = |name: &str| debug.get(name).map_or(&[][..], Vec::as_slice);
        assert!(find_within(&budget, section, &[Some(40)]).iter().all(Vec::is_empty));
        assert!(budget.is_late());
        let is_hostile = AtomicBool::new(true);
        assert!(find(section, &[Some(40)], &is_hostile).is_empty() && is_hostile.into_inner());
    }

    #[test]
    fn nested_inlining_does_not_overflow_the_stack() {
        // A unit and a function in it from 16 to 64, and half a million inlined functions, each
        // within the one before.
        let abbreviations: &[u8] =
            &[1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0, 0, 2, 0x2e, 1, 0x11, 0x01, 0x12, 0x06, 0, 0, 3, 0x1d, 1, 0, 0, 0];
        let range = [16, 0, 0, 0, 48, 0, 0, 0];
        let entries = [&[1][..], &range, &[2], &range, &[3].repeat(500_000), &[0].repeat(500_002)].concat();
        let len = u32::try_from(7 + entries.len()).unwrap().to_le_bytes();
        let info = [&len[..], &[4, 0, 0, 0, 0, 0, 4], &entries].concat();
        let debug = Debug::from([(".debug_abbrev", abbreviations.to_vec()), (".debug_info", info)]);
        assert!(found(&debug, MAX_READS, 40).is_empty());
    }

    #[test]
    fn damaged_information_does_no_harm() {
        let sound = debug();
        for (name, bytes) in &sound {
            for (at, byte) in bytes.iter().enumerate() {
                for value in [0, 1, 0x7f, 0x80, 0xff, byte.wrapping_add(1)] {
                    let mut debug = sound.clone();
                    debug.get_mut(name).unwrap()[at] = value;
                    assert!(found(&debug, 100_000, 40).len() <= MAX_PLACES);
                }
            }
        }
    }
}

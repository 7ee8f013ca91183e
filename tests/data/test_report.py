"""The printed table of a dataset report."""

from lit_rlhf.data.report import DatasetReport


def test_report_is_an_aligned_table():
    report = DatasetReport("rows.json")
    report.num_read = 1100
    for number in range(6):
        report.skip("chosen equals rejected", f"rows.json row {number + 5}")
    report.flag("completion cut to 9 tokens", "rows.json row 1")
    report.add_line("end")
    assert report.format_table() == (
        "rows.json\n"
        "rows read                               1,100\n"
        "  skipped: chosen equals rejected           6  first: rows.json row 5\n"
        "rows kept                               1,094\n"
        "  of these: completion cut to 9 tokens      1  first: rows.json row 1\n"
        "end"
    )
    assert report.format_summary() == "rows read 1,100 · kept 1,094 · 6 chosen equals rejected"


def test_one_line_leaves_out_what_did_not_happen():
    report = DatasetReport("rows.json")
    report.num_read = 1100
    report.register_skip_reason("tied")
    assert report.format_line() == "rows.json: 1,100 rows"
    report.skip("too long", "rows.json row 5")
    report.flag("cut to 9 tokens", "rows.json row 1")
    report.add_validation_line(9, 1090)
    report.add_line("kept in a cache", is_detail=True)
    assert report.format_line() == (
        "rows.json: 1,099 of 1,100 rows; skipped 1: too long (first: rows.json row 5); "
        "of these 1: cut to 9 tokens (first: rows.json row 1); rows held out for validation: 9; left: 1,090"
    )
    assert "kept in a cache" in report.format_table()
